"""Which requests instances die of: suspected by what they did not outlive, condemned by a trial.

Whoever was on an instance when it died is replayed at once with all others, and is a suspect until
it has *outlived* that death: until it got more tokens on one instance than it had got on that one,
or ended well. Suspects are known by tenant, prompt and settings: choices of one request, and what a
client sends again, are one. A suspect is *doubtful* with two deaths not outlived at which it had no
token, or five of whatever kind. The doubtful are put on trial: one at a time, each on an instance
where it computes at once, where until its first token nobody comes beside it, and where nobody else
has two deaths to outlive (just after one nearly everybody has one). The trial is over when it is
doubtful no more. Who brings down two instances on trial is condemned: all that run of it end, and
it is kept out for ten minutes.

Instances die of other things, too. A trial proves nothing if in the meantime an instance died
elsewhere of nobody on trial. And a death is *chance* once all who were there outlived it, or if
nobody was there: for a minute, each makes doubt and proof take one death more. So where instances
die often and of nothing that was asked, hardly anybody is tried for it.

So a request that kills at its prompt costs four instances, one that kills later seven; one more for
each other instance that choices of it are on when it is found doubtful, and some for each time that
instances die of something else too. One that kills after `SETTLED_TOKENS` each time is not
suspected: that may be anything; it is given up after `ClusterConfig.max_num_losses`. Nobody is
blamed for having been beside it. What cannot be told apart is: a few requests that die with their
instances as often as that, before anybody at all gets on; and two alike of which but one kills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from scheduler.cluster.events import PROGRESS_MARKS
from scheduler.types import RequestSpec

MAX_STRIKES = 2  # deaths without a token that were not outlived
MAX_LOSSES = 5  # deaths that were not outlived
SETTLED_TOKENS = max(PROGRESS_MARKS)  # on one instance: that will hardly be its death
TRIAL_DEATHS = 2  # one may be chance: instances are killed from outside, too
QUARANTINE_S = 600.0  # clients retry what failed, and so would it
CHANCE_S = 60.0  # that a death which nobody was to blame for counts in favour of everybody
_MAX_REMEMBERED = 4096

Fingerprint = tuple[str, int, int]


def fingerprint(spec: RequestSpec) -> Fingerprint:
    """Return what tells a request from others, whoever sends it how often with what seed."""
    params = replace(spec.params, seed=0, choice=0, max_tokens=1)
    return (spec.tenant, len(spec.prompt_token_ids), hash((spec.prompt_token_ids, params)))


@dataclass(slots=True)
class _Death:
    """Of an instance: who was there and did not outlive it yet, with the tokens each had there."""

    at_s: float
    num_tokens: dict[Fingerprint, int]
    tried: Fingerprint | None  # against whom it is proof


@dataclass(slots=True)
class _Suspect:
    deaths: list[_Death] = field(default_factory=list)  # that it did not outlive
    has_alibi: bool = False  # since its last trial an instance died elsewhere, of nobody known


class Suspicion:
    """Of the fleet. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        self._suspects: dict[Fingerprint, _Suspect] = {}  # whose last death is oldest comes first
        self._chances_s: list[float] = []  # when instances died of nobody
        self._condemned: dict[Fingerprint, float] = {}  # until when
        self.num_changes = 0  # so that nobody need ask again while it stays

    @property
    def num_quarantined(self) -> int:
        return len(self._condemned)

    def is_empty(self) -> bool:
        """Whether nobody is suspected, so that there is nothing to be asked."""
        return not self._suspects

    def expire(self, now: float) -> None:
        """Forget what is too long ago. All are about in the order of time, so this is quick."""
        while self._chances_s and now - self._chances_s[0] >= CHANCE_S:
            del self._chances_s[0]
            self.num_changes += 1
        while self._suspects:
            key, suspect = next(iter(self._suspects.items()))
            if now - suspect.deaths[-1].at_s < QUARANTINE_S:
                break
            del self._suspects[key]
            self.num_changes += 1
        while self._condemned:
            key, until_s = next(iter(self._condemned.items()))
            if now < until_s:
                break
            del self._condemned[key]

    def died(
        self, there: Mapping[Fingerprint, int], now: float, tried: Fingerprint | None = None
    ) -> bool:
        """An instance died; return whether that condemns the one `tried` there.

        `there` are those who had requests there, with the tokens that these had got there.
        """
        self.num_changes += 1
        there = {key: number for key, number in there.items() if number < SETTLED_TOKENS}
        death = _Death(now, there, tried)
        if not there:
            self._chances_s.append(now)
        if tried is None:
            for key, suspect in self._suspects.items():
                suspect.has_alibi |= key not in there
        for key in there:
            suspect = self._suspects.pop(key, _Suspect())
            suspect.deaths.append(death)
            self._suspects[key] = suspect
        is_condemned = tried is not None and self._is_proven(tried)
        if tried is not None and is_condemned:
            del self._suspects[tried]
            self._condemned.pop(tried, None)  # it goes to the end
            self._condemned[tried] = now + QUARANTINE_S
        _bound(self._suspects)
        _bound(self._condemned)
        return is_condemned

    def _is_proven(self, key: Fingerprint) -> bool:
        suspect = self._suspects.get(key)
        if suspect is None:
            return False
        proofs = [death for death in suspect.deaths if death.tried == key]
        if suspect.has_alibi:
            suspect.has_alibi = False
            for death in proofs:
                death.tried = None
            return False
        return len(proofs) >= TRIAL_DEATHS + len(self._chances_s)

    def got_on(self, key: Fingerprint, num_tokens: int) -> None:
        """It has so many tokens now on one instance, and outlived what it was at with fewer."""
        suspect = self._suspects.get(key)
        if suspect is None:
            return
        for death in [one for one in suspect.deaths if one.num_tokens[key] < num_tokens]:
            suspect.deaths.remove(death)
            del death.num_tokens[key]
            if not death.num_tokens:
                self._chances_s.append(death.at_s)
                self._chances_s.sort()
            self.num_changes += 1
        if not suspect.deaths:
            del self._suspects[key]

    def ended(self, key: Fingerprint) -> None:
        """It ended well."""
        self.got_on(key, SETTLED_TOKENS)

    def is_repeated(self, key: Fingerprint) -> bool:
        """Whether it did not outlive two deaths, so that it is no company for one on trial."""
        suspect = self._suspects.get(key)
        return suspect is not None and len(suspect.deaths) > 1

    def is_doubtful(self, key: Fingerprint) -> bool:
        suspect = self._suspects.get(key)
        if suspect is None:
            return False
        num_chances, num_losses = len(self._chances_s), len(suspect.deaths)
        if num_losses >= MAX_LOSSES + num_chances:
            return True
        if num_losses < MAX_STRIKES + num_chances:
            return False
        strikes = (death for death in suspect.deaths if not death.num_tokens[key])
        return sum(1 for _ in strikes) >= MAX_STRIKES + num_chances

    def is_quarantined(self, key: Fingerprint) -> bool:
        return key in self._condemned


def _bound(entries: dict[Fingerprint, _Suspect] | dict[Fingerprint, float]) -> None:
    while len(entries) > _MAX_REMEMBERED:
        del entries[next(iter(entries))]
