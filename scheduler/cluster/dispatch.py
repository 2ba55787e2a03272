"""Which instance gets a request: pure functions in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from scheduler.cluster.ledger import InstanceLoad
from scheduler.types import InstanceId


class Choice(NamedTuple):
    """The instances that may get the request, never none, and what a policy may go by."""

    loads: Sequence[InstanceLoad]
    last: InstanceId | None  # which the last request went to
    draw: int  # 64 random bits


DispatchPolicy = Callable[[Choice], InstanceId]


def round_robin(choice: Choice) -> InstanceId:
    """The next one after the last, by id."""
    ids = sorted(load.instance_id for load in choice.loads)
    behind = [key for key in ids if choice.last is not None and key > choice.last]
    return (behind or ids)[0]


def least_loaded(choice: Choice) -> InstanceId:
    """The one with the fewest requests; of equals the one with the least to compute first."""
    return min(
        choice.loads, key=lambda load: (load.num_requests, load.num_waiting_tokens, load[0])
    ).instance_id


def power_of_two(choice: Choice) -> InstanceId:
    """The less loaded of two drawn at random (Mitzenmacher, IEEE TPDS 12(10), 2001)."""
    loads = choice.loads
    if len(loads) == 1:
        return loads[0].instance_id
    first = choice.draw % len(loads)
    other = (choice.draw >> 32) % (len(loads) - 1)
    second = other + (other >= first)
    return least_loaded(choice._replace(loads=(loads[first], loads[second])))


def freeness(choice: Choice) -> InstanceId:
    """The one whose memory lasts longest (Llumnix, arXiv 2406.03243)."""
    return min(
        choice.loads, key=lambda load: (-load.freeness, load.num_requests, load[0])
    ).instance_id


DISPATCH_POLICIES: dict[str, DispatchPolicy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "freeness": freeness,
}


def dispatch_policy(name: str) -> DispatchPolicy:
    """Return the policy. Raises ValueError that lists the names."""
    try:
        return DISPATCH_POLICIES[name]
    except KeyError:
        names = ", ".join(DISPATCH_POLICIES)
        raise ValueError(f"there is no dispatch policy {name!r}; there are: {names}") from None
