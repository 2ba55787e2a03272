"""Which requests instances die of: suspected by what they outlived, condemned by a trial alone.

Whoever was on an instance when it died is replayed at once with all others, and is a suspect until
it has got on. Suspects are known by tenant and prompt: choices of one request, and what a client
sends again, are one. A suspect is *doubtful* after two deaths in a row without a token in between,
or three without many. The doubtful are put on trial: one at a time, each on an instance where no
other is, and where it computes at once. Who brings down its instance on trial is condemned: a death
without a token is proof, as such a trial is short; else it takes two. All that run of it end, and
it is kept out for ten minutes.

So a request that kills at its prompt costs three instances, one that kills later five, and nobody
is blamed for having been beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.types import RequestSpec

MAX_STRIKES = 2  # deaths in a row without a token in between
MAX_LOSSES = 3  # deaths in a row without SETTLED_TOKENS in between
SETTLED_TOKENS = 64  # on one instance: that will hardly be its death
LATE_DEATHS = 2  # on trial, of one that got tokens there
QUARANTINE_S = 600.0  # clients retry what failed, and so would it
_MAX_REMEMBERED = 4096

Fingerprint = tuple[str, int, int]


def fingerprint(spec: RequestSpec) -> Fingerprint:
    """Return what tells a request from others, whoever sends it how often with what seed."""
    return (spec.tenant, len(spec.prompt_token_ids), hash(spec.prompt_token_ids))


@dataclass(slots=True)
class _Suspect:
    num_strikes: int = 0
    num_losses: int = 0
    num_trial_deaths: int = 0
    seen_at_s: float = 0.0

    @property
    def is_doubtful(self) -> bool:
        return self.num_strikes >= MAX_STRIKES or self.num_losses >= MAX_LOSSES


class Suspicion:
    """Of the fleet. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        self._suspects: dict[Fingerprint, _Suspect] = {}
        self._condemned: dict[Fingerprint, float] = {}  # until when

    @property
    def num_quarantined(self) -> int:
        return len(self._condemned)

    def is_empty(self) -> bool:
        """Whether nobody is suspected, so that there is nothing to be asked."""
        return not self._suspects

    def died(self, there: Iterable[Fingerprint], now: float) -> None:
        """An instance died; each of these had requests there."""
        for key in dict.fromkeys(there):
            suspect = self._suspects.pop(key, None)
            if suspect is None or now - suspect.seen_at_s > QUARANTINE_S:
                suspect = _Suspect()
            suspect.num_strikes += 1
            suspect.num_losses += 1
            suspect.seen_at_s = now
            self._suspects[key] = suspect
        _bound(self._suspects)

    def died_on_trial(self, key: Fingerprint, now: float) -> bool:
        """Its instance died while it was on trial there; True if that condemns it."""
        suspect = self._suspects.get(key)
        if suspect is None:
            return False
        suspect.num_trial_deaths += 1
        if suspect.num_strikes <= MAX_STRIKES and suspect.num_trial_deaths < LATE_DEATHS:
            return False
        del self._suspects[key]
        self._condemned[key] = now + QUARANTINE_S
        _bound(self._condemned)
        return True

    def is_doubtful(self, key: Fingerprint) -> bool:
        suspect = self._suspects.get(key)
        return suspect is not None and suspect.is_doubtful

    def got_token(self, key: Fingerprint) -> None:
        """It was not its prompt that instances died of."""
        suspect = self._suspects.get(key)
        if suspect is not None:
            suspect.num_strikes = 0

    def settled(self, key: Fingerprint) -> None:
        """It ended well, or got so far that it is suspected no more."""
        self._suspects.pop(key, None)

    def is_quarantined(self, key: Fingerprint, now: float) -> bool:
        until_s = self._condemned.get(key)
        if until_s is not None and now >= until_s:
            del self._condemned[key]
            return False
        return until_s is not None


def _bound(entries: dict[Fingerprint, _Suspect] | dict[Fingerprint, float]) -> None:
    while len(entries) > _MAX_REMEMBERED:
        del entries[next(iter(entries))]
