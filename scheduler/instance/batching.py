"""The order in which waiting requests are admitted: pure functions in a table."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.request import Request

# A policy gives each waiting request a key; the smallest is admitted next. Admission never goes
# past a request that does not fit yet, so no large request starves behind smaller ones.
AdmissionPolicy = Callable[[Request], tuple[float, ...]]


def fcfs(request: Request) -> tuple[float, ...]:
    """First come, first served; a preempted request keeps its place."""
    return (request.ordinal,)


ADMISSION_POLICIES: dict[str, AdmissionPolicy] = {"fcfs": fcfs}


def admission_policy(name: str) -> AdmissionPolicy:
    """Return the policy of that name. Raises ValueError that lists the names."""
    if name not in ADMISSION_POLICIES:
        known = ", ".join(sorted(ADMISSION_POLICIES))
        raise ValueError(f"unknown policy {name!r}; known policies: {known}")
    return ADMISSION_POLICIES[name]
