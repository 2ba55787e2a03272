"""The seam between the loop and whatever computes: a plan goes in, a result comes out."""

from __future__ import annotations

from typing import Protocol

from scheduler.instance.plan import StepPlan, StepResult


class Executor(Protocol):
    """Executes step plans in the order they are submitted, one result for each.

    It owns the persistent batch that plans are deltas of, and the KV memory. One thread calls it.
    """

    def submit(self, plan: StepPlan) -> None:
        """Start a step; it may still run when this returns."""
        ...

    def poll(self) -> StepResult:
        """Wait for the oldest submitted step that was not polled yet, and return its result."""
        ...

    def close(self) -> None:
        """Give device and memory back; nothing may be called afterwards."""
        ...
