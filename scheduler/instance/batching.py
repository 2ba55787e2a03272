"""The order in which requests are served: pure functions in a table."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.request import Request
from scheduler.types import RequestSpec

# A policy gives each request a rank. A smaller rank comes strictly first: it is admitted and gets
# tokens before larger ones, and takes their places and blocks if it must.
RankPolicy = Callable[[RequestSpec], int]


def fcfs(_: RequestSpec) -> int:
    """First come, first served."""
    return 0


def priority(spec: RequestSpec) -> int:
    """Strictly by the request's priority, as in vLLM: the smaller number first."""
    return spec.priority


POLICIES: dict[str, RankPolicy] = {"fcfs": fcfs, "priority": priority}


def rank_policy(name: str) -> RankPolicy:
    """Return the policy of that name. Raises ValueError that lists the names."""
    if name not in POLICIES:
        known = ", ".join(sorted(POLICIES))
        raise ValueError(f"unknown policy {name!r}; known policies: {known}")
    return POLICIES[name]


def waiting_order(request: Request) -> tuple[int, bool, int]:
    """Within a rank: those that were preempted, then the others, each by arrival.

    Admission never goes past a request that does not fit yet, so no large request starves behind
    smaller ones, and no preempted one behind newcomers.
    """
    return (request.rank, request.num_preemptions == 0, request.ordinal)


def running_order(request: Request) -> tuple[int, int]:
    """By rank, then by admission."""
    return (request.rank, request.admission)
