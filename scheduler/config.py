"""Settings of the pure core: frozen, checked when made, never written to afterwards.

What is measured at start (how many blocks fit, how long a step takes) is not a setting: see
`types.KVGeometry` and `costs`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """Limits of one instance.

    A running request computes at least one token in every step, so the token budget of a step
    must not be smaller than the number of requests that may run.
    """

    max_model_len: int  # prompt + output tokens of one request
    max_num_batched_tokens: int = 512  # token budget of a step
    max_step_s: float | None = None  # of a step while requests decode: see `instance.budget`
    # Of such a step, whatever it takes: with fewer, a step costs nearly as much, as it reads the
    # same weights.
    min_prompt_tokens: int = 16
    max_num_running: int = 64
    max_num_waiting: int = 512  # beside those that may run; beyond it a request is refused
    policy: str = "fcfs"
    max_num_preemptions: int = 3  # of one request; then it comes back with all its blocks for good
    prefix_caching: bool = True
    model_revision: str = ""  # prefixes computed by another model are other prefixes

    def __post_init__(self) -> None:
        at_least_1 = ("max_model_len", "max_num_batched_tokens", "max_num_running")
        for name in (*at_least_1, "min_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_step_s is not None and not self.max_step_s > 0:
            raise ValueError(f"max_step_s must be more than 0, not {self.max_step_s}")
        if self.max_num_waiting < 0:
            raise ValueError(f"max_num_waiting must not be negative, not {self.max_num_waiting}")
        if self.max_num_batched_tokens < self.max_num_running:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_running ({self.max_num_running}): each running request computes a token "
                "in every step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How requests are spread over instances, and what becomes of those that lose theirs."""

    dispatch: str = "freeness"
    priority_headroom_tokens: int = 0  # kept on an instance that has requests of a rank below 0
    prefix_affinity: bool = True
    prefix_caching: bool = True  # of the instances: what they have computed need not be again
    max_num_waiting: int = 512  # beside those that may run; beyond it a request is refused
    continuation_timeout_s: float = 30.0  # that a request waits while no instance is up
    max_num_losses: int = 32  # instances that may die under one request
    seed: int = 0  # of what policies draw
    uses_ledger: bool = True  # off only to show what it gives
