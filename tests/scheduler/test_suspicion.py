"""Requests that instances die of: found after few deaths, kept out for a while, none else blamed.

Driven through the cluster scheduler; a *poison* kills each instance that it was sent to, before it
has a token.
"""

from __future__ import annotations

from dataclasses import replace

from scheduler.cluster.events import (
    Arrived,
    Cancelled,
    Dispatch,
    Ended,
    Fail,
    FailReason,
    FirstToken,
    InstanceDown,
    InstanceUp,
    MoveAway,
    Reject,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.cluster.suspicion import QUARANTINE_S, Quarantine, culprit
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId
from tests.factories import make_capacity, make_spec

A, B = InstanceId("a"), InstanceId("b")


class Fleet:
    """Instances that come back at once, die of every poison, and answer all else with a token."""

    def __init__(self, num_instances, *, poison=(), max_num_running=8, **settings):
        self.cluster = ClusterScheduler(
            ClusterConfig(dispatch="least_loaded", prefix_affinity=False, **settings)
        )
        self.capacity = make_capacity(max_num_running=max_num_running)
        self.poison = {RequestId(name) for name in poison}
        self.where = {}
        self.num_deaths = 0
        self.failed = {}
        for index in range(num_instances):
            self.tell(InstanceUp(InstanceId(f"i{index}"), self.capacity))

    def tell(self, event, now=0.0):
        actions = self.cluster.handle(event, now)
        for action in actions:
            match action:
                case Dispatch(spec, instance_id):
                    self.where[spec.request_id] = instance_id
                case Fail(request_id, reason):
                    self.failed[request_id] = reason
                    self.where.pop(request_id, None)
        return actions

    def arrive(self, *names):
        return [self.tell(Arrived(make_spec(name, prompt=(ord(name[0]),)))) for name in names]

    def kill(self, instance_id):
        """The instance dies and a new one of its name is up."""
        self.num_deaths += 1
        for name in [name for name, place in self.where.items() if place == instance_id]:
            del self.where[name]
        self.tell(InstanceDown(instance_id))
        self.tell(InstanceUp(instance_id, self.capacity))

    def until_quiet(self):
        """Let instances die of poisons until there is none left on any."""
        while doomed := sorted({self.where[name] for name in self.poison & set(self.where)}):
            self.kill(doomed[0])

    def settle(self):
        """Let time pass: poisons kill, all others get a token, those in doubt have their trial."""
        for _ in range(9):
            self.until_quiet()
            for name in list(self.where):
                self.token(name)

    def token(self, name):
        self.tell(FirstToken(RequestId(name), self.where[name]))


def test_the_one_that_was_at_more_deaths_in_a_row_than_all_others_is_to_blame():
    assert culprit([("r", 2), ("s", 1), ("t", 0)]) == "r"
    assert culprit([("r", 1), ("s", 2), ("t", 1)]) == "s"
    assert culprit([("r", 2), ("s", 3), ("t", 2)]) == "s", "s was on trial, the others were not"
    assert culprit([("r", 2), ("s", 2), ("t", 1)]) is None
    assert culprit([("r", 2), ("s", 3), ("t", 3), ("u", 2)]) is None
    assert culprit([("r", 1)]) is None
    assert culprit([]) is None


def test_a_poison_that_runs_alone_brings_down_two_instances():
    fleet = Fleet(2, poison="p")
    fleet.arrive("p")
    fleet.until_quiet()
    assert fleet.failed == {"p": FailReason.QUARANTINED}
    assert fleet.num_deaths == 2


def test_a_poison_among_requests_that_get_on_brings_down_two_instances_and_fails_alone():
    fleet = Fleet(1, poison="p")
    fleet.arrive("q", "p", "r")
    fleet.kill(InstanceId("i0"))
    for name in "qr":
        fleet.token(name)
    fleet.until_quiet()
    assert fleet.failed == {"p": FailReason.QUARANTINED}
    assert fleet.num_deaths == 2
    assert set(fleet.where) == {"q", "r"}


def test_a_poison_among_requests_that_do_not_get_on_brings_down_three_and_fails_alone():
    for num_instances in (1, 2, 3):
        for poison in "opqrs":
            fleet = Fleet(num_instances, poison=poison)
            fleet.arrive(*"opqrs")
            fleet.settle()
            assert fleet.failed == {poison: FailReason.QUARANTINED}
            assert fleet.num_deaths <= 3
            assert set(fleet.where) == set("opqrs") - {poison}
            assert fleet.cluster.num_queued == 0


def test_two_poisons_are_found_and_nobody_else_is_blamed():
    for pair in ("op", "or", "qs"):
        fleet = Fleet(2, poison=pair)
        fleet.arrive(*"opqrs")
        fleet.settle()
        assert fleet.failed == dict.fromkeys(pair, FailReason.QUARANTINED)
        assert set(fleet.where) == set("opqrs") - set(pair)


def test_the_doubtful_are_tried_one_at_a_time_on_an_instance_and_by_several_at_once():
    fleet = Fleet(1)
    fleet.arrive(*"pqr")
    fleet.kill(InstanceId("i0"))
    fleet.kill(InstanceId("i0"))
    assert list(fleet.where) == ["p"]
    assert fleet.cluster.state()["doubtful"] == ["q", "r"]
    fleet.tell(InstanceUp(InstanceId("i1"), fleet.capacity))
    assert fleet.where == {"p": "i0", "q": "i1"}
    fleet.token("q")
    assert fleet.where == {"p": "i0", "q": "i1", "r": "i1"}


def test_others_are_served_while_one_is_on_trial():
    fleet = Fleet(1)
    fleet.arrive(*"pq")
    fleet.kill(InstanceId("i0"))
    fleet.kill(InstanceId("i0"))
    fleet.arrive("x")
    assert set(fleet.where) == {"p", "x"}


def test_one_that_got_on_begins_anew():
    """A long request meets many deaths; it is to blame for none that it outlives."""
    fleet = Fleet(1)
    fleet.arrive("r")
    for _ in range(6):
        fleet.kill(InstanceId("i0"))
        fleet.token("r")
    fleet.kill(InstanceId("i0"))
    assert fleet.failed == {}
    fleet.kill(InstanceId("i0"))
    assert fleet.failed == {"r": FailReason.QUARANTINED}


def test_one_that_loses_too_many_instances_is_given_up_though_not_blamed():
    fleet = Fleet(1, max_num_losses=4)
    fleet.arrive("r")
    for _ in range(4):
        fleet.kill(InstanceId("i0"))
        fleet.token("r")
    assert fleet.failed == {}
    fleet.kill(InstanceId("i0"))
    assert fleet.failed == {"r": FailReason.TOO_MANY_LOSSES}
    assert fleet.arrive("r") == [[Dispatch(make_spec("r", prompt=(ord("r"),)), "i0")]]


def test_an_end_that_was_asked_for_is_nobodys_fault():
    fleet = Fleet(1, max_num_losses=0)
    fleet.arrive("r")
    for _ in range(5):
        fleet.tell(InstanceDown(InstanceId("i0"), was_ours=True))
        fleet.tell(InstanceUp(InstanceId("i0"), fleet.capacity))
    assert fleet.failed == {}
    assert fleet.where == {"r": "i0"}


def test_one_that_was_moved_away_is_not_blamed_for_the_death_of_where_it_was():
    fleet = Fleet(2)
    fleet.arrive("r")
    for _ in range(3):
        home = fleet.where["r"]
        fleet.tell(MoveAway(home))
        assert fleet.where["r"] != home
        fleet.tell(InstanceDown(home))
        fleet.tell(InstanceUp(home, fleet.capacity))
    assert fleet.failed == {}


def test_nobody_is_suspected_while_one_that_was_moved_away_is_not_yet_let_go():
    fleet = Fleet(1)
    fleet.arrive("x")
    fleet.kill(InstanceId("i0"))
    fleet.arrive("p")
    fleet.tell(MoveAway(InstanceId("i0")))
    fleet.tell(Ended(RequestId("x"), InstanceId("i0")))
    assert fleet.where["x"] == "i0", "it is back, and p is still there"
    fleet.kill(InstanceId("i0"))
    assert fleet.failed == {}
    assert fleet.where == {"x": "i0", "p": "i0"}


def test_moving_a_doubtful_one_does_not_end_its_trial():
    fleet = Fleet(1)
    fleet.arrive(*"pq")
    fleet.kill(InstanceId("i0"))
    fleet.kill(InstanceId("i0"))
    fleet.tell(InstanceUp(InstanceId("i1"), fleet.capacity))
    assert fleet.where == {"p": "i0", "q": "i1"}
    fleet.tell(MoveAway(InstanceId("i0")))
    assert fleet.cluster.state()["doubtful"] == ["p"], "i1 tries another, i0 lets go of it first"
    fleet.tell(Ended(RequestId("p"), InstanceId("i0")))
    assert fleet.where == {"p": "i0", "q": "i1"}


def test_one_whose_client_left_may_have_been_the_one():
    """It is there until its instance lets go of it; if that dies, its neighbour is not blamed."""
    fleet = Fleet(1)
    fleet.arrive(*"pq")
    fleet.kill(InstanceId("i0"))
    fleet.tell(Cancelled(RequestId("p")))
    fleet.kill(InstanceId("i0"))
    assert fleet.failed == {}
    assert fleet.where == {"q": "i0"}
    assert fleet.cluster.state()["assigned"] == {"q": "i0"}


def test_a_doubtful_one_may_be_cancelled_while_it_waits_for_its_trial():
    fleet = Fleet(1)
    fleet.arrive(*"pq")
    fleet.kill(InstanceId("i0"))
    fleet.kill(InstanceId("i0"))
    assert fleet.tell(Cancelled(RequestId("q"))) == []
    assert fleet.cluster.num_queued == 0
    fleet.token("p")
    assert fleet.where == {"p": "i0"}


def test_a_doubtful_one_that_fits_no_instance_any_more_is_failed():
    """Else it would wait for ever: instances are up, so no limit to being alone ends it."""
    fleet = Fleet(1)
    for name in ("big", "too"):
        fleet.tell(Arrived(make_spec(name, prompt=range(200))))
    fleet.kill(InstanceId("i0"))
    fleet.tell(InstanceDown(InstanceId("i0")))
    assert fleet.cluster.num_queued == 2
    fleet.tell(InstanceUp(InstanceId("i0"), make_capacity(max_model_len=100)))
    assert fleet.failed == dict.fromkeys(("big", "too"), FailReason.NO_INSTANCE)
    assert fleet.cluster.num_queued == 0


# --- quarantine ---


def test_the_same_request_is_refused_for_a_while_under_whatever_name():
    fleet = Fleet(1, poison="p")
    fleet.arrive("p")
    fleet.until_quiet()
    again = make_spec("again", prompt=(ord("p"),), max_tokens=3, seed=9)
    rejected = [Reject(RequestId("again"), RejectReason.QUARANTINED)]
    assert fleet.tell(Arrived(again), now=QUARANTINE_S - 1) == rejected
    assert fleet.tell(Arrived(replace(again, tenant="other")), now=1.0) != rejected
    fleet.tell(Ended(RequestId("again"), InstanceId("i0")))
    assert fleet.tell(Arrived(make_spec("x", prompt=(1, 2))), now=1.0)[0].spec.request_id == "x"
    assert isinstance(fleet.tell(Arrived(again), now=QUARANTINE_S)[0], Dispatch)
    assert fleet.cluster.state()["num_quarantined"] == 0


def test_a_second_offence_holds_from_then_on():
    quarantine, spec = Quarantine(), make_spec()
    quarantine.add(spec, 0.0)
    quarantine.add(spec, 100.0)
    assert quarantine.holds(spec, QUARANTINE_S + 99)
    assert not quarantine.holds(spec, QUARANTINE_S + 100)


def test_the_quarantine_is_bounded_and_the_oldest_are_forgotten():
    quarantine = Quarantine()
    specs = [make_spec(prompt=(index,)) for index in range(1025)]
    for now, spec in enumerate(specs):
        quarantine.add(spec, float(now) / 1000)
    assert len(quarantine) == 1024
    assert not quarantine.holds(specs[0], 2.0)
    assert quarantine.holds(specs[1], 2.0)
