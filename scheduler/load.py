"""What an instance tells the fleet about its load: a frozen snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StepSize(NamedTuple):
    """What a step computed."""

    num_tokens: int = 0
    num_requests: int = 0


_NO_STEP = StepSize()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCounters:
    """Where KV blocks are, and what became of them; all but the first three grow from the start."""

    num_idle_blocks: int = 0  # cached prefixes that nobody uses now
    num_claimed_blocks: int = 0  # free, but kept behind a request that grows
    longest_free_run_blocks: int = 0  # of those that are free and not claimed
    num_stolen_blocks: int = 0  # taken from the slack behind another request
    num_evicted_blocks: int = 0
    num_copied_blocks: int = 0
    num_cleared_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """The load of one instance at one moment; counters grow from its start."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # known tokens of waiting requests, all to be computed
    num_blocks: int
    num_free_blocks: int  # idle prefixes included, as they give way
    num_steps: int  # completed
    num_computed_tokens: int
    num_preemptions: int
    num_failures: int = 0
    num_deferred: int = 0  # of those waiting, for a prefix that another request computes
    num_given: int = 0  # requests that the instance was ever given, those it refused included
    num_head_blocks: int = 0  # that the first of those waiting demands
    last_step: StepSize = _NO_STEP  # of those completed
    kv: KVCounters = KVCounters()

    @classmethod
    def idle(cls, num_blocks: int) -> InstanceView:
        """Return the view of an instance that was never given a request."""
        return cls(
            num_running=0,
            num_waiting=0,
            num_waiting_tokens=0,
            num_blocks=num_blocks,
            num_free_blocks=num_blocks,
            num_steps=0,
            num_computed_tokens=0,
            num_preemptions=0,
        )

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks
