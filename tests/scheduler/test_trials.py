"""Trials of requests that instances may have died of: alone where they could kill, one at a time.

Driven through the cluster scheduler.
"""

from __future__ import annotations

import pytest

from scheduler.cluster.events import (
    Arrived,
    Cancelled,
    Ended,
    FailReason,
    InstanceDown,
    InstanceUp,
    MoveAway,
    Reported,
)
from scheduler.cluster.suspicion import SETTLED_TOKENS
from scheduler.types import RequestId
from tests.factories import make_capacity, make_spec, make_view
from tests.scheduler.mortal_fleet import A, B, Fleet, doubtful, suspect


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
