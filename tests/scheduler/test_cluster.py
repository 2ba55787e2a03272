"""The cluster scheduler: events in, actions out, every request assigned to one instance at most."""

from __future__ import annotations

import pytest

from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    Dispatch,
    DrainStarted,
    Ended,
    Fail,
    InstanceDown,
    InstanceUp,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.costs import LinearStepCost, StepShape
from scheduler.types import InstanceId, RejectReason, RequestId
from tests.factories import make_scheduler, make_spec

A, B = InstanceId("a"), InstanceId("b")


def make_cluster(*instances, max_requests=2):
    cluster = ClusterScheduler()
    for instance_id in instances:
        assert cluster.handle(InstanceUp(instance_id, max_requests), 0.0) == []
    return cluster


def arrive(cluster, name):
    (action,) = cluster.handle(Arrived(make_spec(name)), 0.0)
    return action


def test_requests_go_where_the_fewest_are():
    cluster = make_cluster(A, B)
    assert [arrive(cluster, name).instance_id for name in ("r0", "r1", "r2")] == [A, B, A]
    cluster.handle(Ended(RequestId("r1")), 0.0)
    assert arrive(cluster, "r3") == Dispatch(make_spec("r3"), B)


def test_a_full_fleet_refuses_and_recovers():
    cluster = make_cluster(A, max_requests=1)
    arrive(cluster, "r0")
    assert arrive(cluster, "r1") == Reject(RequestId("r1"), RejectReason.QUEUE_FULL)
    cluster.handle(Ended(RequestId("r0")), 0.0)
    assert arrive(cluster, "r2") == Dispatch(make_spec("r2"), A)


@pytest.mark.parametrize("event", [DrainStarted(), InstanceDown(A)])
def test_without_an_instance_or_while_draining_nothing_is_taken(event):
    cluster = make_cluster(A)
    assert cluster.accepts
    cluster.handle(event, 0.0)
    assert not cluster.accepts
    assert arrive(cluster, "r0") == Reject(RequestId("r0"), RejectReason.NO_INSTANCE)


def test_an_id_runs_once():
    cluster = make_cluster(A)
    arrive(cluster, "r0")
    assert arrive(cluster, "r0") == Reject(RequestId("r0"), RejectReason.DUPLICATE_ID)


def test_a_cancelled_request_keeps_its_place_until_its_instance_says_so():
    cluster = make_cluster(A, max_requests=1)
    arrive(cluster, "r0")
    assert cluster.handle(Cancelled(RequestId("r0")), 0.0) == [Abort(RequestId("r0"), A)]
    assert isinstance(arrive(cluster, "r1"), Reject)
    cluster.handle(Ended(RequestId("r0")), 0.0)
    assert cluster.handle(Cancelled(RequestId("r0")), 0.0) == []
    assert isinstance(arrive(cluster, "r1"), Dispatch)


def test_what_counts_of_a_complete_text_goes_along():
    cluster = make_cluster(A)
    arrive(cluster, "r0")
    assert cluster.handle(Cancelled(RequestId("r0"), 5), 0.0) == [Abort(RequestId("r0"), A, 5)]


def test_the_state_is_plain_data():
    cluster = make_cluster(A, B)
    arrive(cluster, "r0")
    assert cluster.is_up(A)
    cluster.handle(InstanceDown(B), 0.0)
    assert not cluster.is_up(B)
    assert cluster.state() == {
        "draining": False,
        "instances": {"a": {"num_assigned": 1, "max_requests": 2}},
        "assigned": {"r0": "a"},
    }


def test_a_lost_instance_fails_what_it_ran_and_nothing_else():
    cluster = make_cluster(A, B)
    for name in ("r0", "r1", "r2"):
        arrive(cluster, name)
    view = make_scheduler().view()
    cluster.handle(Reported(A, view), 0.0)
    assert cluster.views() == {A: view}
    lost = cluster.handle(InstanceDown(A), 0.0)
    assert lost == [Fail(RequestId("r0")), Fail(RequestId("r2"))]
    assert cluster.views() == {}
    assert cluster.handle(Ended(RequestId("r0")), 0.0) == [], "a late word from the dead"
    assert arrive(cluster, "r3") == Dispatch(make_spec("r3"), B)


def test_a_linear_cost_adds_up():
    cost = LinearStepCost(fixed_s=1.0, token_s=0.5, request_s=0.25, context_token_s=0.125)
    assert cost.step_s(StepShape(4, 2, 8)) == 1.0 + 2.0 + 0.5 + 1.0


def test_a_view_tells_the_load():
    scheduler = make_scheduler(num_blocks=4, max_num_running=1)
    scheduler.add(make_spec("a", range(8), max_tokens=2), 0.0)
    scheduler.add(make_spec("b", range(5), max_tokens=2), 0.0)
    scheduler.plan_step(0.0)
    view = scheduler.view()
    assert (view.num_running, view.num_waiting, view.num_waiting_tokens) == (1, 1, 5)
    assert view.kv_usage == 0.5
