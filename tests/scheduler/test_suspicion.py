"""Requests that instances die of: found after few deaths, kept out for a while, none else blamed.

Driven through the cluster scheduler. A *poison* kills each instance that it was sent to: before it
has a token there, or after so many.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.cluster.events import (
    PROGRESS_MARKS,
    Abort,
    Arrived,
    Cancelled,
    Dispatch,
    Elapsed,
    Ended,
    Fail,
    FailReason,
    FirstToken,
    InstanceDown,
    InstanceUp,
    MoveAway,
    Progressed,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.cluster.suspicion import (
    CHANCE_S,
    QUARANTINE_S,
    SETTLED_TOKENS,
    Suspicion,
    fingerprint,
)
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId
from tests.factories import make_capacity, make_spec, make_view

A, B = InstanceId("i0"), InstanceId("i1")


class Fleet:
    """Instances that come back at once and obey at once, and die of poisons."""

    def __init__(self, num_instances, *, max_num_running=8, **settings):
        self.cluster = ClusterScheduler(
            ClusterConfig(dispatch="least_loaded", prefix_affinity=False, **settings),
            rank=lambda spec: spec.priority,
        )
        self.capacity = make_capacity(max_num_running=max_num_running)
        self.kills_after = {}  # so many tokens of a life
        self.num_tokens = {}  # where each is, of this life
        self.num_deaths = 0
        self.failed = {}
        self.refused = {}
        for index in range(num_instances):
            self.tell(InstanceUp(InstanceId(f"i{index}"), self.capacity))

    @property
    def where(self):
        return {name: instance_id for instance_id, name in self.num_tokens}

    def tell(self, event, now=0.0):
        actions = self.cluster.handle(event, now)
        for action in actions:
            match action:
                case Dispatch(spec, instance_id):
                    self.num_tokens[instance_id, spec.request_id] = 0
                case Fail(request_id, reason):
                    self.failed[request_id] = reason
                case Reject(request_id, reason):
                    self.refused[request_id] = reason
        for action in actions:
            if isinstance(action, Abort):
                self.end(action.request_id, action.instance_id)
        return actions

    def arrive(self, *names, kills_after=None, priority=0):
        """Those of the same first letter have the same prompt."""
        for name in names:
            if kills_after is not None:
                self.kills_after[name] = kills_after
            spec = make_spec(name, prompt=(ord(name[0]), *map(ord, name[1:2] * (name[0] == "b"))))
            self.tell(Arrived(replace(spec, priority=priority)))

    def kill(self, *instance_ids):
        """The instances die, and then new ones of their names are up."""
        for instance_id in instance_ids:
            self.num_deaths += 1
            for key in [key for key in self.num_tokens if key[0] == instance_id]:
                del self.num_tokens[key]
            self.tell(InstanceDown(instance_id))
        for instance_id in instance_ids:
            self.tell(InstanceUp(instance_id, self.capacity))

    def token(self, name):
        """It gets a token, or kills its instance."""
        key = self.where[name], RequestId(name)
        if self.num_tokens[key] >= self.kills_after.get(name, 10**9):
            self.kill(key[0])
            return
        self.num_tokens[key] += 1
        if self.num_tokens[key] == 1:
            self.tell(FirstToken(key[1], key[0]))
        if self.num_tokens[key] in PROGRESS_MARKS:
            self.tell(Progressed(key[1], key[0], self.num_tokens[key]))

    def end(self, name, instance_id=None):
        instance_id = instance_id or self.where[name]
        self.num_tokens.pop((instance_id, name), None)
        self.tell(Ended(RequestId(name), instance_id))

    def run(self, num_tokens, rng=None):
        """Each that runs gets so many tokens, one after the other, in whatever order."""
        for _ in range(num_tokens):
            names = list(self.where)
            if rng is not None:
                rng.shuffle(names)
            for name in names:
                if name in self.where:
                    self.token(name)


# --- how many deaths it takes, and that nobody else is blamed ---


BYSTANDERS = [f"b{chr(65 + index)}" for index in range(20)]


@pytest.mark.parametrize("num_instances", [1, 2, 3, 4])
@pytest.mark.parametrize("num_choices", [1, 2, 4, 8])
@pytest.mark.parametrize("kills_after", [0, 1, 20, 63])
def test_a_poison_is_found_alone_among_twenty(num_instances, num_choices, kills_after):
    """Four deaths if it kills at its prompt, seven if later, and one for each other place."""
    most = 4 if not kills_after else 7 + min(num_choices, num_instances) - 1
    for seed in range(3):
        rng = random.Random(seed)
        fleet = Fleet(num_instances)
        choices = [f"p{index}" for index in range(num_choices)]
        names = [*BYSTANDERS, "p"]
        rng.shuffle(names)
        for name in names:
            if name == "p":
                fleet.arrive(*choices, kills_after=kills_after)
            else:
                fleet.arrive(name)
        done = set()
        for _ in range(60):
            fleet.run(rng.randint(1, 70), rng)
            for name in [name for name in fleet.where if name[0] == "b"][:4]:
                fleet.end(name)
                done.add(name)
        assert fleet.failed == dict.fromkeys(choices, FailReason.QUARANTINED)
        assert fleet.num_deaths <= most
        assert done == set(BYSTANDERS)
        assert not fleet.cluster.num_queued


def test_what_is_sent_again_after_its_client_left_is_found_too():
    for kills_after, most in ((0, 4), (5, 7)):
        fleet = Fleet(2)
        for number in range(9):
            name = f"p{number}"
            fleet.arrive(name)
            if name in fleet.refused:
                break
            fleet.run(kills_after)
            # It is told to drop it, and dies before it obeys.
            home = fleet.where[name]
            fleet.cluster.handle(Cancelled(RequestId(name)), 0.0)
            fleet.kill(home)
        assert fleet.refused == {f"p{most}": RejectReason.QUARANTINED}
        assert fleet.num_deaths == most


def test_two_poisons_are_found_and_nobody_else_is_blamed():
    for seed in range(20):
        fleet = Fleet(2)
        fleet.arrive("p", "q", kills_after=0)
        fleet.arrive(*"rst")
        for _ in range(9):
            fleet.run(70, random.Random(seed))
        assert fleet.failed == dict.fromkeys("pq", FailReason.QUARANTINED)
        assert fleet.num_deaths <= 4 + 4 + 2
        assert set(fleet.where) == set("rst")


def test_choices_without_a_token_are_called_back_when_they_are_found_doubtful():
    """They would kill where they are, before the trial is over."""
    fleet = Fleet(3)
    fleet.arrive("p0", "p1", "p2", kills_after=0)
    assert set(fleet.where.values()) == {"i0", "i1", "i2"}
    fleet.token("p0")
    fleet.token(next(name for name, place in fleet.where.items() if place == "i1"))
    assert len(fleet.where) == 1, "one is on trial"
    assert fleet.cluster.num_queued == 2
    fleet.run(2)
    assert fleet.num_deaths == 4
    assert fleet.failed == dict.fromkeys(["p0", "p1", "p2"], FailReason.QUARANTINED)


# --- the trial ---


def doubtful(*names, num_instances=1):
    """Return a fleet where two instances died under these."""
    fleet = Fleet(num_instances)
    fleet.arrive(*names)
    for _ in range(2):
        fleet.kill(*(InstanceId(f"i{index}") for index in range(num_instances)))
    return fleet


def test_the_doubtful_are_tried_one_at_a_time_on_an_instance_and_by_several_at_once():
    fleet = doubtful(*"pqr")
    assert fleet.where == {"p": "i0"}
    assert fleet.cluster.state()["doubtful"] == ["q", "r"]
    fleet.tell(InstanceUp(B, fleet.capacity))
    assert fleet.where == {"p": "i0", "q": "i1"}
    fleet.token("q")
    assert fleet.where == {"p": "i0", "q": "i1", "r": "i1"}, "q has passed"


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_who_was_at_one_death_may_be_beside_a_trial_and_who_was_at_two_may_not(num_deaths):
    """Just after a death nearly everybody was at it; they would hold up all trials."""
    fleet = Fleet(1)
    fleet.arrive("x")
    fleet.token("x")
    for _ in range(num_deaths):
        fleet.kill(A)
        fleet.token("x")
    suspect(fleet, "p")
    fleet.arrive("p")
    assert set(fleet.where) == ({"x", "p"} if num_deaths == 1 else {"x"})
    for _ in range(SETTLED_TOKENS):
        fleet.token("x")
    assert set(fleet.where) == {"x", "p"}


def test_one_prompt_has_one_trial_at_a_time():
    fleet = doubtful("p0", "p1")
    fleet.tell(InstanceUp(B, fleet.capacity))
    assert fleet.where == {"p0": "i0"}
    fleet.token("p0")
    assert set(fleet.where) == {"p0", "p1"}, "none of them is doubtful any more"


def test_nobody_is_beside_one_on_trial_until_its_first_token():
    fleet = doubtful("p")
    fleet.arrive("x")
    fleet.arrive("u", priority=-1)
    assert fleet.where == {"p": "i0"}
    fleet.token("p")
    assert set(fleet.where) == set("pxu")


def test_no_trial_begins_where_requests_wait_or_all_places_are_taken():
    fleet = Fleet(2, max_num_running=1)
    fleet.arrive("p")
    fleet.kill(A)
    fleet.tell(InstanceDown(A, was_ours=True))
    fleet.arrive("x")
    assert fleet.where == {"p": "i1", "x": "i1"}
    fleet.token("x")
    fleet.end("x")
    fleet.kill(B)
    assert fleet.where == {"p": "i1"}, "an instance without others"
    fleet.arrive("y")
    fleet.arrive("z")
    assert fleet.cluster.num_queued == 2


def suspect(fleet, name, num_deaths=2, num_tokens=0):
    for _ in range(num_deaths):
        key = fingerprint(make_spec(prompt=(ord(name[0]),)))
        stranger = fingerprint(make_spec(prompt=(1, 2, 3)))  # who is to blame, so no alibi
        fleet.cluster._trials._suspicion.died({key: num_tokens}, 0.0, stranger)


def test_those_behind_a_doubtful_one_wait_until_an_instance_is_free_for_it():
    """Else it would wait for ever in a fleet that is always busy."""
    fleet = Fleet(1, max_num_running=1)
    suspect(fleet, "p")
    fleet.arrive("x0", "x1", "p", "y0")
    fleet.arrive("u", priority=-1)
    assert set(fleet.where) == {"x0", "x1", "u"}, "who comes before it does not wait"
    for name in ("u", "x0"):
        fleet.end(name)
    assert set(fleet.where) == {"x1"}
    fleet.end("x1")
    assert set(fleet.where) == {"p"}
    fleet.token("p")
    assert set(fleet.where) == {"p", "y0"}


def test_one_instance_is_kept_free_for_whom_is_next_and_the_others_serve():
    fleet = Fleet(2, max_num_running=2)
    suspect(fleet, "p")
    fleet.arrive("bA", "bB", "bC", "bD")
    fleet.run(1)
    fleet.arrive("p", "x", "y")
    assert fleet.cluster.num_queued == 2, "there was room for a spare one on both"
    free = next(place for place in (A, B) if place != fleet.where["x"])
    fleet.end(next(name for name, place in fleet.where.items() if place == free))
    assert fleet.where["p"] == free
    fleet.token("p")
    assert fleet.where["y"] == free


def test_a_trial_does_not_begin_where_it_would_wait_for_memory():
    fleet = Fleet(1)
    suspect(fleet, "p")
    fleet.arrive("x")
    fleet.token("x")
    fleet.tell(Reported(A, make_view(num_running=1, num_free_blocks=0, num_given=1)))
    fleet.arrive("p")
    assert set(fleet.where) == {"x"}
    fleet.end("x")
    assert set(fleet.where) == {"p"}


def test_a_death_beside_another_doubtful_one_proves_nothing():
    """It was there before it was found doubtful."""
    fleet = Fleet(2)
    fleet.arrive("q0", "q1")
    fleet.run(1)
    suspect(fleet, "p")
    fleet.arrive("p")
    assert fleet.cluster.ledgers()[A].trial == "p"
    suspect(fleet, "q", num_deaths=3)
    fleet.kill(A)
    assert fleet.failed == {}


def test_a_trial_proves_nothing_while_instances_die_of_something_else():
    fleet = doubtful("p")
    fleet.tell(InstanceUp(B, fleet.capacity))
    for _ in range(3):
        fleet.kill("i0" if fleet.where["p"] == "i1" else "i1")
        fleet.kill(fleet.where["p"])
        assert fleet.failed == {}
    for _ in range(1 + 2 + 3):  # one is excused by the last, and three died without any request
        assert fleet.failed == {}
        fleet.kill(fleet.where["p"])
    assert fleet.failed == {"p": FailReason.QUARANTINED}


def test_the_death_of_another_on_trial_speaks_for_nobody():
    fleet = doubtful(*"pq")
    fleet.tell(InstanceUp(B, fleet.capacity))
    for name in "pqp":
        fleet.kill(fleet.where[name])
    assert fleet.failed == {"p": FailReason.QUARANTINED}
    fleet.kill(fleet.where["q"])
    assert set(fleet.failed) == {"p", "q"}


def test_one_that_got_on_begins_anew():
    """A long request meets many deaths; it is to blame for none that it outlives."""
    fleet = Fleet(1)
    fleet.arrive("r")
    for _ in range(20):
        fleet.run(SETTLED_TOKENS)
        fleet.kill(A)
    assert fleet.failed == {}
    assert fleet.where == {"r": "i0"}


def test_one_that_gets_a_token_each_time_is_tried_twice():
    fleet = Fleet(1)
    fleet.arrive("r")
    for _ in range(6):
        fleet.run(SETTLED_TOKENS - 1)
        fleet.kill(A)
    assert fleet.failed == {}
    fleet.run(SETTLED_TOKENS - 1)
    fleet.kill(A)
    assert fleet.failed == {"r": FailReason.QUARANTINED}


@pytest.mark.parametrize("ends", ["by itself", "by a stop string"])
def test_one_that_ended_well_is_suspected_no_more(ends):
    fleet = Fleet(1)
    for number in range(9):
        name = f"r{number}"
        fleet.arrive(name)
        fleet.kill(A)
        fleet.run(1)
        if ends == "by itself":
            fleet.end(name)
        else:
            fleet.tell(Cancelled(RequestId(name), 1))
        assert fleet.cluster._trials._suspicion.is_empty()
    assert fleet.failed == {}


def test_one_that_loses_too_many_instances_is_given_up_though_not_blamed():
    fleet = Fleet(1, max_num_losses=4)
    fleet.arrive("r")
    for _ in range(4):
        fleet.run(SETTLED_TOKENS)
        fleet.kill(A)
    assert fleet.failed == {}
    fleet.kill(A)
    assert fleet.failed == {"r": FailReason.TOO_MANY_LOSSES}


def test_an_end_that_was_asked_for_is_nobodys_fault():
    fleet = Fleet(1, max_num_losses=0)
    fleet.arrive("r")
    for _ in range(5):
        fleet.num_tokens.clear()
        fleet.tell(InstanceDown(A, was_ours=True))
        fleet.tell(InstanceUp(A, fleet.capacity))
    assert fleet.failed == {}
    assert fleet.where == {"r": "i0"}


def test_nobody_is_suspected_while_one_that_was_moved_away_is_not_yet_let_go():
    fleet = Fleet(1)
    fleet.arrive("x")
    fleet.kill(A)
    fleet.arrive("p")
    for event in (MoveAway(A), Ended(RequestId("x"), A)):
        fleet.cluster.handle(event, 0.0)
    assert fleet.cluster.owner(RequestId("x")) == A, "it is back, and p is still there"
    fleet.kill(A)
    assert fleet.cluster.state()["doubtful"] == []
    assert fleet.where == {"x": "i0", "p": "i0"}


def test_moving_a_doubtful_one_does_not_end_its_trial():
    fleet = doubtful(*"pq")
    fleet.tell(InstanceUp(B, fleet.capacity))
    fleet.cluster.handle(MoveAway(A), 0.0)
    assert fleet.cluster.state()["doubtful"] == ["p"], "i1 tries another, i0 lets go of it first"
    fleet.tell(Ended(RequestId("p"), A))
    assert fleet.where == {"p": "i0", "q": "i1"}


def test_a_doubtful_one_may_be_cancelled_while_it_waits_for_its_trial():
    fleet = doubtful(*"pq")
    assert fleet.tell(Cancelled(RequestId("q"))) == []
    assert fleet.cluster.num_queued == 0


def test_a_doubtful_one_that_fits_no_instance_any_more_is_failed():
    """Else it would wait for ever: instances are up, so no limit to being alone ends it."""
    fleet = Fleet(1)
    for name in ("big", "too"):
        fleet.tell(Arrived(make_spec(name, prompt=(*range(200), ord(name[0])))))
    fleet.kill(A)
    fleet.tell(InstanceDown(A))
    assert fleet.cluster.num_queued == 2
    fleet.tell(InstanceUp(A, make_capacity(max_model_len=100)))
    assert fleet.failed == dict.fromkeys(("big", "too"), FailReason.NO_INSTANCE)
    assert fleet.cluster.num_queued == 0


def test_one_that_an_instance_never_got_to_is_not_failed():
    """A low priority waits behind others through any number of deaths, and is then tried alone."""
    fleet = Fleet(1, max_num_running=2)
    fleet.arrive("w", priority=5)
    num_trials = 0
    for number in range(30):
        urgent = [f"x{number}", f"y{number}"]
        fleet.arrive(*urgent)
        if fleet.cluster.ledgers()[A].trial == "w":
            num_trials += 1
            fleet.run(SETTLED_TOKENS)
        else:
            fleet.kill(A)
        for name in {*urgent} & fleet.where.keys():
            fleet.end(name)
    assert fleet.failed == {}
    assert num_trials > 1


# --- deaths by chance: all who were there got on since ---


def killed_by_chance(fleet, num_deaths):
    """Kill an instance so many times under one that gets on."""
    fleet.arrive("x")
    for _ in range(num_deaths):
        fleet.token("x")
        fleet.kill(fleet.where["x"])
    fleet.run(SETTLED_TOKENS)


@pytest.mark.parametrize("num_by_chance", [0, 1, 3])
@pytest.mark.parametrize("kills_after", [0, 5])
def test_each_death_by_chance_makes_doubt_and_proof_slower_for_a_minute(num_by_chance, kills_after):
    most = 4 if not kills_after else 7
    for later_s, num_more in ((0.0, 2 * num_by_chance), (CHANCE_S, 0)):
        fleet = Fleet(1)
        killed_by_chance(fleet, num_by_chance)
        fleet.end("x")
        fleet.tell(Elapsed(), now=later_s)
        fleet.arrive("p", kills_after=kills_after)
        fleet.run((kills_after + 1) * (most + num_more))
        assert fleet.failed == {"p": FailReason.QUARANTINED}
        assert fleet.num_deaths == num_by_chance + most + num_more


def test_a_death_is_no_chance_while_one_that_was_there_did_not_get_on():
    fleet = Fleet(1)
    fleet.arrive("p", kills_after=5)
    fleet.arrive("x")
    while not fleet.failed:
        fleet.run(6)
    assert fleet.failed == {"p": FailReason.QUARANTINED}
    assert fleet.num_deaths == 7


def test_an_innocent_outlives_any_number_of_kills_that_others_outlive():
    """Where instances die of nobody's doing, all take part in it, and nobody is tried."""
    for seed in range(10):
        rng = random.Random(seed)
        fleet = Fleet(3, max_num_losses=100)
        fleet.arrive(*BYSTANDERS[:12])
        for _ in range(60):
            fleet.run(rng.randint(5, 60), rng)
            fleet.kill(InstanceId(f"i{rng.randrange(3)}"))
        assert fleet.failed == {}


def test_what_was_at_no_death_says_nothing_for_those_alike():
    """A prompt that kills with some seeds alone is doubted although others get on with it."""
    fleet = Fleet(1)
    fleet.arrive("p0", kills_after=5)
    for number in range(1, 9):
        fleet.run(6)
        if fleet.failed:
            break
        fleet.arrive(f"p{number}")
        if f"p{number}" in fleet.where:
            fleet.token(f"p{number}")
            fleet.end(f"p{number}")
    assert fleet.num_deaths == 7
    assert fleet.failed["p0"] is FailReason.QUARANTINED


def test_other_settings_are_another_request():
    spec = make_spec(prompt=(1, 2), max_tokens=5)
    for same in ({"seed": 5}, {"choice": 2}, {"max_tokens": 9}):
        alike = replace(spec, params=replace(spec.params, **same))
        assert fingerprint(alike) == fingerprint(spec)
    other = replace(spec, params=replace(spec.params, logprobs=5))
    assert fingerprint(other) != fingerprint(spec)


def test_who_was_at_two_deaths_does_not_come_beside_a_trial():
    """Its death there would be counted against another."""
    fleet = Fleet(2)
    fleet.arrive("x")
    fleet.token("x")
    for _ in range(2):
        fleet.kill(fleet.where["x"])
        fleet.token("x")
    suspect(fleet, "p", num_deaths=5, num_tokens=32)
    fleet.arrive("p")
    assert fleet.where["p"] != fleet.where["x"]
    fleet.token("p")
    fleet.tell(InstanceDown(fleet.where["x"]))
    fleet.num_tokens = {key: n for key, n in fleet.num_tokens.items() if key[1] == "p"}
    fleet.arrive("y")
    assert set(fleet.where) == {"p"}, "x is first, and y behind it"
    fleet.run(SETTLED_TOKENS)
    assert set(fleet.where) == {"p", "x", "y"}


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
def test_whoever_gets_further_than_where_it_died_outlived_that(num_tokens):
    fleet = Fleet(1)
    fleet.arrive("r")
    for _ in range(4):
        fleet.run(num_tokens)
        fleet.kill(A)
    suspicion = fleet.cluster._trials._suspicion
    fleet.run(num_tokens)
    assert not suspicion.is_empty()
    fleet.run(num_tokens)
    assert suspicion.is_empty()


# --- quarantine ---


def condemned(suspicion, key, now):
    for _ in range(3):
        suspicion.died({key: 0}, now)
    assert not suspicion.died({key: 0}, now, key), "one may be chance"
    assert suspicion.died({key: 0}, now, key)


def test_the_same_request_is_refused_for_a_while_under_whatever_name():
    fleet = Fleet(1)
    fleet.arrive("p", kills_after=0)
    fleet.run(4)
    assert fleet.failed == {"p": FailReason.QUARANTINED}
    again = make_spec("again", prompt=(ord("p"),), max_tokens=3, seed=9)
    rejected = [Reject(RequestId("again"), RejectReason.QUARANTINED)]
    assert fleet.tell(Arrived(again), now=QUARANTINE_S - 1) == rejected
    assert fleet.tell(Arrived(replace(again, tenant="other")), now=1.0) != rejected
    fleet.end("again", A)
    assert isinstance(fleet.tell(Arrived(again), now=QUARANTINE_S)[0], Dispatch)
    assert fleet.cluster.state()["num_quarantined"] == 0


def test_a_second_offence_holds_from_then_on():
    suspicion, key = Suspicion(), fingerprint(make_spec())
    condemned(suspicion, key, 0.0)
    condemned(suspicion, key, 100.0)
    suspicion.expire(QUARANTINE_S + 99)
    assert suspicion.is_quarantined(key)
    suspicion.expire(QUARANTINE_S + 100)
    assert not suspicion.is_quarantined(key)


def test_who_is_at_no_death_for_long_is_suspected_no_more():
    suspicion, key = Suspicion(), fingerprint(make_spec())
    for now in (0.0, 100.0):
        suspicion.died({key: 0}, now)
    suspicion.expire(QUARANTINE_S + 99)
    assert suspicion.is_doubtful(key)
    suspicion.expire(QUARANTINE_S + 100)
    assert suspicion.is_empty()


def test_what_is_remembered_is_bounded_and_the_oldest_are_forgotten():
    suspicion = Suspicion()
    keys = [fingerprint(make_spec(prompt=(index,))) for index in range(4097)]
    suspicion.died(dict.fromkeys(keys, 0), 0.0)
    assert [key in suspicion._suspects for key in keys[:2]] == [False, True]
    suspicion = Suspicion()
    for key in keys:
        condemned(suspicion, key, 0.0)
    assert suspicion.num_quarantined == 4096
    assert [suspicion.is_quarantined(key) for key in keys[:2]] == [False, True]
