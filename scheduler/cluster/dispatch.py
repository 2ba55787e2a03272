"""Which instance gets a request: policies, pure functions in a table, and who applies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from scheduler.cluster.affinity import CHUNK_TOKENS, PrefixAffinity, preferred
from scheduler.cluster.ledger import InstanceLoad, Ledger
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RequestSpec

_MASK = (1 << 64) - 1


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
    """The one with the fewest requests for its places; of equals the one with the least to compute
    first.
    """
    return min(
        choice.loads,
        key=lambda load: (
            load.num_requests / load.max_num_running,
            load.num_waiting_tokens,
            load.instance_id,
        ),
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
        choice.loads, key=lambda load: (-load.freeness, load.num_requests, load.instance_id)
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


class Dispatcher:
    """Applies a policy, and remembers what that takes: the last choice, and what was sent where."""

    def __init__(self, config: ClusterConfig) -> None:
        self._policy = dispatch_policy(config.dispatch)
        self._prefers = config.prefix_affinity
        self._affinity = PrefixAffinity() if config.prefix_caching else None
        self._seed = config.seed
        self._num_choices = 0
        self._last: InstanceId | None = None

    def choose(self, spec: RequestSpec, candidates: Sequence[Ledger]) -> tuple[Ledger, int]:
        """Return who gets the request, and how many tokens of its prompt are to be computed."""
        loads: Sequence[InstanceLoad] = [ledger.load() for ledger in candidates]
        keys, found = [], {}
        if self._affinity is not None:
            keys = self._affinity.keys(spec)
            found = self._affinity.found(keys)
            if self._prefers:
                loads = preferred(loads, found)
        self._num_choices += 1
        chosen = self._policy(Choice(loads, self._last, _mixed(self._seed + self._num_choices)))
        self._last = chosen
        if self._affinity is not None:
            self._affinity.sent(keys, chosen)
        num_tokens = len(spec.prompt_token_ids)
        if chosen in found:  # and perhaps a part of the next chunk
            num_tokens = max(1, num_tokens - found[chosen] - (CHUNK_TOKENS - 1))
        return next(one for one in candidates if one.instance_id == chosen), num_tokens

    def forget(self, instance_id: InstanceId) -> None:
        """An instance is gone, and all that it had computed."""
        if self._affinity is not None:
            self._affinity.forget(instance_id)


def _mixed(number: int) -> int:
    """Return 64 bits that look random: splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (number * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
