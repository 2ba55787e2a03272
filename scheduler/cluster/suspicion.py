"""Which requests instances die of: suspected by what they outlived, condemned by a trial alone.

Whoever was on an instance when it died is replayed at once with all others, and is a suspect until
it has got on. Suspects are known by tenant and prompt: choices of one request, and what a client
sends again, are one. A suspect is *doubtful* after two deaths in a row without a token in between,
or five without many. The doubtful are put on trial: one at a time, each on an instance where it
computes at once, where until its first token nobody comes beside it, and where nobody else was at
two deaths. (At one was nearly everybody, just after it; and nobody of those is beside it twice.)
Who brings down two instances on trial is condemned: all that run of it end, and it is kept out for
ten minutes. A trial proves nothing if in the meantime an instance died elsewhere of nobody on
trial: instances die of something else then.

So a request that kills at its prompt costs four instances, one that kills later seven; one more for
each other instance that choices of it are on when it is found doubtful, and one more for each time
that instances die of something else too. Nobody is blamed for having been beside it, nor for what
happens to instances from outside, unless that hits it four times in a row before it had a token,
twice of them on trial, and meanwhile nobody else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from scheduler.types import RequestSpec

MAX_STRIKES = 2  # deaths in a row without a token in between
MAX_LOSSES = 5  # deaths in a row without SETTLED_TOKENS in between
SETTLED_TOKENS = 64  # on one instance: that will hardly be its death
TRIAL_DEATHS = 2  # one may be chance: instances are killed from outside, too
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
    has_alibi: bool = False  # in between an instance died elsewhere, of nobody known
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

    def expire(self, now: float) -> None:
        """Forget what is too long ago. Both are in the order of time, so this is quick."""
        while self._suspects:
            key, suspect = next(iter(self._suspects.items()))
            if now - suspect.seen_at_s < QUARANTINE_S:
                break
            del self._suspects[key]
        while self._condemned:
            key, until_s = next(iter(self._condemned.items()))
            if now < until_s:
                break
            del self._condemned[key]

    def died(self, there: Collection[Fingerprint], now: float, *, is_explained: bool) -> None:
        """An instance died, alone with one on trial or not; each of these had requests there."""
        for key, suspect in self._suspects.items():
            suspect.has_alibi |= not is_explained and key not in there
        for key in there:
            suspect = self._suspects.pop(key, _Suspect())
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
        if suspect.has_alibi:
            suspect.has_alibi, suspect.num_trial_deaths = False, 0
            return False
        suspect.num_trial_deaths += 1
        if suspect.num_trial_deaths < TRIAL_DEATHS:
            return False
        del self._suspects[key]
        self._condemned.pop(key, None)  # it goes to the end
        self._condemned[key] = now + QUARANTINE_S
        _bound(self._condemned)
        return True

    def is_repeated(self, key: Fingerprint) -> bool:
        """Whether it was at more than one death, so that it is no company for one on trial."""
        suspect = self._suspects.get(key)
        return suspect is not None and suspect.num_losses > 1

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

    def is_quarantined(self, key: Fingerprint) -> bool:
        return key in self._condemned


def _bound(entries: dict[Fingerprint, _Suspect] | dict[Fingerprint, float]) -> None:
    while len(entries) > _MAX_REMEMBERED:
        del entries[next(iter(entries))]
