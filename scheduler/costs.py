"""What a step costs, as a model: the clock of the simulator and of the fake executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int  # computed in this step
    num_requests: int
    num_context_tokens: int  # keys read: the sum over requests of their length after the step


class StepCostModel(Protocol):
    def step_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of this shape takes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepCost:
    """`fixed + tokens + requests + context`, each times its own cost in seconds.

    Linear in the three counts: dense layers cost per token, sampling and bookkeeping per request,
    attention per key read. The quadratic part of a long prefill is left out, as chunks bound it.
    """

    fixed_s: float = 0.0
    token_s: float = 0.0
    request_s: float = 0.0
    context_token_s: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        return (
            self.fixed_s
            + self.token_s * shape.num_tokens
            + self.request_s * shape.num_requests
            + self.context_token_s * shape.num_context_tokens
        )
