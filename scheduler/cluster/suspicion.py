"""Which requests instances die of: suspected by what they outlived, condemned by a trial alone.

Whoever was on an instance when it died is replayed at once with all others, and is a suspect until
it has got on. Suspects are known by tenant, prompt and settings: choices of one request, and what a
client sends again, are one. A suspect is *doubtful* after two deaths in a row without a token in
between, or five without many. The doubtful are put on trial: one at a time, each on an instance
where it computes at once, where until its first token nobody comes beside it, and where nobody else
was at two deaths (at one was nearly everybody, just after it) but those that passed a trial since.
Who brings down two instances on trial is condemned: all that run of it end, and it is kept out for
ten minutes.

Instances die of other things, too. A trial proves nothing if in the meantime an instance died
elsewhere of nobody on trial. And a death is *chance* once all who were there got on since, or if
nobody was there: for a minute, each makes doubt and proof take one death more. So where instances
die often and of nothing that was asked, nobody is tried for it for long.

So a request that kills at its prompt costs four instances, one that kills later seven; one more for
each other instance that choices of it are on when it is found doubtful, and some for each time that
instances die of something else too. One that kills after more than 64 tokens each time gets on each
time, and is given up when it has lost `ClusterConfig.max_num_losses`. Nobody is blamed for having
been beside it. What cannot be told apart is: a few requests that die with their instances as often
as that, before anybody at all gets on; and in a flood of different such requests, some innocent
ones that fresh ones meet on trial twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from scheduler.types import RequestSpec

MAX_STRIKES = 2  # deaths in a row without a token in between
MAX_LOSSES = 5  # deaths in a row without SETTLED_TOKENS in between
SETTLED_TOKENS = 64  # on one instance: that will hardly be its death
TRIAL_DEATHS = 2  # one may be chance: instances are killed from outside, too
QUARANTINE_S = 600.0  # clients retry what failed, and so would it
CHANCE_S = 60.0  # that a death which nobody was to blame for counts in favour of everybody
_MAX_REMEMBERED = 4096
_MAX_DEATHS = 64

Fingerprint = tuple[str, int, int]


def fingerprint(spec: RequestSpec) -> Fingerprint:
    """Return what tells a request from others, whoever sends it how often with what seed."""
    params = replace(spec.params, seed=0, choice=0, max_tokens=1)
    return (spec.tenant, len(spec.prompt_token_ids), hash((spec.prompt_token_ids, params)))


@dataclass(slots=True)
class _Suspect:
    num_strikes: int = 0
    num_losses: int = 0
    num_trial_deaths: int = 0
    has_passed: bool = False  # a trial for its prompt, since its last death
    has_alibi: bool = False  # in between an instance died elsewhere, of nobody known
    seen_at_s: float = 0.0


@dataclass(slots=True)
class _Death:
    at_s: float
    unsettled: set[Fingerprint]  # who was there, and did not get on since


class Suspicion:
    """Of the fleet. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        self._suspects: dict[Fingerprint, _Suspect] = {}
        self._deaths: deque[_Death] = deque(maxlen=_MAX_DEATHS)
        self.num_changes = 0  # so that nobody need ask again while it stays
        self._num_chance = 0  # of these deaths that nobody who lives is to blame for
        self._condemned: dict[Fingerprint, float] = {}  # until when

    @property
    def num_quarantined(self) -> int:
        return len(self._condemned)

    def is_empty(self) -> bool:
        """Whether nobody is suspected, so that there is nothing to be asked."""
        return not self._suspects

    def expire(self, now: float) -> None:
        """Forget what is too long ago. Both are in the order of time, so this is quick."""
        while self._deaths and now - self._deaths[0].at_s >= CHANCE_S:
            self._num_chance -= not self._deaths.popleft().unsettled
            self.num_changes += 1
        while self._suspects:
            key, suspect = next(iter(self._suspects.items()))
            if now - suspect.seen_at_s < QUARANTINE_S:
                break
            del self._suspects[key]
            self.num_changes += 1
        while self._condemned:
            key, until_s = next(iter(self._condemned.items()))
            if now < until_s:
                break
            del self._condemned[key]

    def died(self, there: Collection[Fingerprint], now: float, *, is_explained: bool) -> None:
        """An instance died, alone with one on trial or not; each of these had requests there."""
        self.num_changes += 1
        if len(self._deaths) == self._deaths.maxlen:
            self._num_chance -= not self._deaths[0].unsettled
        self._deaths.append(_Death(now, set(there)))
        self._num_chance += not there
        for key, suspect in self._suspects.items():
            suspect.has_alibi |= not is_explained and key not in there
        for key in there:
            suspect = self._suspects.pop(key, _Suspect())
            suspect.num_strikes += 1
            suspect.num_losses += 1
            suspect.has_passed = False
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
        if suspect.num_trial_deaths < TRIAL_DEATHS + self._num_chance:
            return False
        del self._suspects[key]
        self.num_changes += 1
        self._condemned.pop(key, None)  # it goes to the end
        self._condemned[key] = now + QUARANTINE_S
        _bound(self._condemned)
        return True

    def is_repeated(self, key: Fingerprint) -> bool:
        """Whether it was at more than one death, so that it is no company for one on trial."""
        suspect = self._suspects.get(key)
        return suspect is not None and suspect.num_losses > 1 and not suspect.has_passed

    def is_doubtful(self, key: Fingerprint) -> bool:
        suspect = self._suspects.get(key)
        return suspect is not None and (
            suspect.num_strikes >= MAX_STRIKES + self._num_chance
            or suspect.num_losses >= MAX_LOSSES + self._num_chance
        )

    def got_token(self, key: Fingerprint) -> None:
        """It was not its prompt that instances died of."""
        suspect = self._suspects.get(key)
        if suspect is not None:
            suspect.num_strikes = 0
            self.num_changes += 1

    def passed(self, key: Fingerprint) -> None:
        """It was tried for its prompt, and may be company for others until its next death."""
        suspect = self._suspects.get(key)
        if suspect is not None:
            suspect.has_passed, suspect.num_trial_deaths = True, 0

    def settled(self, key: Fingerprint) -> None:
        """It ended well, or got so far that it is suspected no more."""
        self._suspects.pop(key, None)
        self.num_changes += 1
        for death in self._deaths:
            if key in death.unsettled:
                death.unsettled.remove(key)
                self._num_chance += not death.unsettled

    def is_quarantined(self, key: Fingerprint) -> bool:
        return key in self._condemned


def _bound(entries: dict[Fingerprint, _Suspect] | dict[Fingerprint, float]) -> None:
    while len(entries) > _MAX_REMEMBERED:
        del entries[next(iter(entries))]
