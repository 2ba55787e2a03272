"""Who gives way when blocks or places run out: pure functions of who runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.request import InvariantError, Request


def newest(candidates: Sequence[Request], max_num_preemptions: int) -> Request:
    """Return who gives way to the first of `candidates`, which lacks blocks: maybe itself.

    `candidates` are running requests without a chunk in the plan that is being made, in running
    order. The last admitted of the lowest rank loses the least. Who was preempted so often that all
    its blocks were reserved when it came back runs to completion.
    """
    for request in reversed(candidates):
        if request.num_preemptions < max_num_preemptions:
            return request
    raise InvariantError(f"{candidates[0].request_id} lacks blocks that were reserved for it")


def outranked(
    request: Request,
    candidates: Sequence[Request],
    max_num_preemptions: int,
    is_enough: Callable[[Sequence[Request]], bool],
) -> list[Request]:
    """Return the fewest of `candidates` that make room for a request that waits, none if in vain.

    They are of a strictly lower rank, the lowest and newest first.
    """
    victims: list[Request] = []
    for candidate in reversed(candidates):
        if candidate.rank <= request.rank:
            break
        if candidate.num_preemptions < max_num_preemptions:
            victims.append(candidate)
            if is_enough(victims):
                return victims
    return []
