"""Which requests instances die of: found by what they have in common, and kept out for a while.

A request that was on an instance when it died is replayed at once with all others. One that was
there again, and had not got on by a single token in between, is *doubtful*: if it was at more
deaths than all others there, it is to blame; else the doubtful ones are tried one at a time. So one
request brings down two instances, three at most, and nobody is blamed for having been beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from scheduler.types import RequestSpec

MAX_STRIKES = 2  # deaths in a row without a token in between
QUARANTINE_S = 600.0  # clients retry what failed, and so would it
_MAX_QUARANTINED = 1024

T = TypeVar("T")
Fingerprint = tuple[str, int, int]


def culprit(strikes: Iterable[tuple[T, int]]) -> T | None:
    """Given the requests of an instance that died, and how often in a row each was at a death,
    return the one that is to blame; None if that cannot be told (yet).
    """
    blamed, most = None, MAX_STRIKES - 1
    for request, number in strikes:
        if number > most:
            blamed, most = request, number
        elif number == most:  # each that causes deaths in a row was at all of them
            blamed = None
    return blamed


class Quarantine:
    """The requests that instances died of, by tenant and prompt; the oldest are forgotten."""

    def __init__(self) -> None:
        self._until_s: dict[Fingerprint, float] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, spec: RequestSpec, now: float) -> None:
        if len(self._until_s) >= _MAX_QUARANTINED:
            del self._until_s[next(iter(self._until_s))]
        self._until_s[_fingerprint(spec)] = now + QUARANTINE_S

    def holds(self, spec: RequestSpec, now: float) -> bool:
        if not self._until_s:
            return False
        key = _fingerprint(spec)
        until_s = self._until_s.get(key)
        if until_s is not None and now >= until_s:
            del self._until_s[key]
            return False
        return until_s is not None


def _fingerprint(spec: RequestSpec) -> Fingerprint:
    return (spec.tenant, len(spec.prompt_token_ids), hash(spec.prompt_token_ids))
