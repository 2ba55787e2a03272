"""Requests that instances die of: found after few deaths, kept out for a while, none else blamed.

Driven through the cluster scheduler.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.cluster.events import (
    Arrived,
    Cancelled,
    Dispatch,
    Elapsed,
    FailReason,
    InstanceDown,
    Reject,
)
from scheduler.cluster.suspicion import (
    CHANCE_S,
    QUARANTINE_S,
    SETTLED_TOKENS,
    Suspicion,
    fingerprint,
)
from scheduler.types import InstanceId, RejectReason, RequestId
from tests.factories import make_spec
from tests.scheduler.mortal_fleet import A, Fleet, suspect

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
