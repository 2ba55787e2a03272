"""The cluster scheduler: events in, actions out, each request queued or at one instance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    Dispatch,
    DrainStarted,
    Elapsed,
    Ended,
    Fail,
    FailReason,
    FirstToken,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    MoveAway,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId
from tests.factories import make_capacity, make_spec, make_view

A, B, C = map(InstanceId, "abc")


def make_cluster(*instances, max_num_running=2, rank=lambda _: 0, **settings):
    settings = {"dispatch": "least_loaded", "prefix_affinity": False, **settings}
    cluster = ClusterScheduler(ClusterConfig(**settings), rank=rank)
    for instance_id in instances:
        capacity = make_capacity(max_num_running=max_num_running)
        assert cluster.handle(InstanceUp(instance_id, capacity), 0.0) == []
    return cluster


def arrive(cluster, name, now=0.0, **spec):
    return cluster.handle(Arrived(make_spec(name, **spec)), now)


def end(cluster, name, instance_id):
    return cluster.handle(Ended(RequestId(name), instance_id), 0.0)


def sent(actions):
    """Return who was dispatched where; there must be nothing else."""
    assert all(isinstance(action, Dispatch) for action in actions), actions
    return [(action.spec.request_id, action.instance_id) for action in actions]


def fill(cluster, num, **spec):
    return [pair for index in range(num) for pair in sent(arrive(cluster, f"f{index}", **spec))]


# --- arrivals ---


def test_a_request_is_dispatched_at_once_where_there_is_room():
    cluster = make_cluster(A, B)
    assert fill(cluster, 3) == [("f0", A), ("f1", B), ("f2", A)]
    assert cluster.owner(RequestId("f1")) == B
    assert cluster.num_assigned(A) == 2


@pytest.mark.parametrize("event", [DrainStarted(), InstanceDown(A), InstanceDraining(A)])
def test_nothing_is_taken_while_the_fleet_drains_or_no_instance_takes_requests(event):
    cluster = make_cluster(A)
    assert cluster.accepts
    cluster.handle(event, 0.0)
    assert not cluster.accepts
    assert arrive(cluster, "r") == [Reject(RequestId("r"), RejectReason.NO_INSTANCE)]


def test_an_id_lives_once_until_its_instance_says_that_it_ended():
    cluster = make_cluster(A, B)
    arrive(cluster, "r")
    twice = [Reject(RequestId("r"), RejectReason.DUPLICATE_ID)]
    assert arrive(cluster, "r") == twice
    cluster.handle(Cancelled(RequestId("r")), 0.0)
    assert arrive(cluster, "r") == twice
    end(cluster, "r", A)
    assert sent(arrive(cluster, "r")) == [("r", A)]


def test_what_fits_no_instance_is_refused():
    cluster = make_cluster(A)
    at_most = make_capacity().max_model_len
    assert sent(arrive(cluster, "r", prompt=range(at_most - 8)))
    never = [Reject(RequestId("s"), RejectReason.NEVER_FITS)]
    assert arrive(cluster, "s", prompt=range(at_most - 7)) == never


def test_the_last_token_needs_no_memory():
    capacity = make_capacity(num_blocks=4, block_size=4)
    assert capacity.fits(17)
    assert not capacity.fits(18)


def test_what_fits_one_of_several_goes_there_however_busy_it_is():
    cluster = make_cluster(A)
    cluster.handle(InstanceUp(B, make_capacity(max_model_len=16)), 0.0)
    assert fill(cluster, 3, prompt=range(20)) == [("f0", A), ("f1", A), ("f2", A)]


def test_what_fits_only_one_that_drains_is_refused_for_now():
    cluster = make_cluster(A)
    cluster.handle(InstanceUp(B, make_capacity(max_model_len=16)), 0.0)
    cluster.handle(InstanceDraining(A), 0.0)
    for_now = [Reject(RequestId("r"), RejectReason.NO_INSTANCE)]
    assert arrive(cluster, "r", prompt=range(20)) == for_now


def test_a_full_queue_refuses_and_recovers():
    cluster = make_cluster(A, max_num_waiting=1)
    assert len(fill(cluster, 3)) == 3
    full = [Reject(RequestId("r"), RejectReason.QUEUE_FULL)]
    assert arrive(cluster, "r") == full, "two run, one waits, wherever that is"
    end(cluster, "f0", A)
    assert sent(arrive(cluster, "r")) == [("r", A)]


# --- the queue ---


def test_what_finds_no_room_waits_here_and_goes_when_there_is():
    cluster = make_cluster(A, B)
    fill(cluster, 6)
    assert arrive(cluster, "r") == []
    assert cluster.num_queued == 1
    assert cluster.owner(RequestId("r")) is None
    assert sent(end(cluster, "f1", B)) == [("r", B)]
    assert cluster.num_queued == 0


def test_prompts_that_began_make_room():
    cluster = make_cluster()
    cluster.handle(InstanceUp(A, make_capacity(max_num_running=8, max_num_waiting_tokens=20)), 0.0)
    fill(cluster, 1, prompt=range(20))
    assert arrive(cluster, "r") == []
    assert sent(cluster.handle(FirstToken(RequestId("f0"), A), 0.0)) == [("r", A)]


def test_an_instance_that_comes_up_takes_what_waits():
    cluster = make_cluster(A)
    fill(cluster, 3)
    for name in ("r", "s"):
        arrive(cluster, name)
    assert sent(cluster.handle(InstanceUp(B, make_capacity()), 0.0)) == [("r", B), ("s", B)]


def test_requests_leave_the_queue_by_rank_and_then_as_they_came():
    cluster = make_cluster(A, max_num_running=1, rank=lambda spec: spec.priority)
    fill(cluster, 2)
    for index, priority in enumerate([1, 2, 1, 2]):
        spec = replace(make_spec(f"r{index}"), priority=priority)
        assert cluster.handle(Arrived(spec), 0.0) == []
    order, running = [], ["f0", "f1"]
    while running:
        for name, _ in sent(end(cluster, running.pop(0), A)):
            order.append(name)
            running.append(name)
    assert order == ["r0", "r2", "r1", "r3"]


def test_an_urgent_request_does_not_wait_behind_what_an_instance_lets_wait_for_it():
    cluster = make_cluster(A, max_num_running=1, rank=lambda spec: spec.priority)
    fill(cluster, 2)
    assert arrive(cluster, "r") == []
    urgent = replace(make_spec("u"), priority=-1)
    assert sent(cluster.handle(Arrived(urgent), 0.0)) == [("u", A)]


def test_nobody_goes_past_the_head_of_the_queue():
    cluster = make_cluster(A, max_num_running=1)
    cluster.handle(InstanceUp(B, make_capacity(max_num_running=1, max_model_len=16)), 0.0)
    long = range(20)
    for name in ("l0", "l1"):
        arrive(cluster, name, prompt=long)
    assert arrive(cluster, "l2", prompt=long) == []
    assert arrive(cluster, "short") == []
    assert sent(end(cluster, "l0", A)) == [("l2", A), ("short", B)]


def test_a_request_that_waits_may_be_cancelled():
    cluster = make_cluster(A)
    fill(cluster, 3)
    for name in ("r", "s"):
        arrive(cluster, name)
    assert cluster.handle(Cancelled(RequestId("r")), 0.0) == []
    assert cluster.num_queued == 1
    assert sent(end(cluster, "f0", A)) == [("s", A)]
    assert cluster.handle(Cancelled(RequestId("r")), 0.0) == []


# --- ends ---


def test_a_cancelled_request_keeps_its_place_until_its_instance_says_so():
    cluster = make_cluster(A, max_num_running=1)
    fill(cluster, 2)
    assert cluster.handle(Cancelled(RequestId("f0")), 0.0) == [Abort(RequestId("f0"), A)]
    assert cluster.handle(Cancelled(RequestId("f0")), 0.0) == [], "once is enough"
    assert arrive(cluster, "r") == []
    assert sent(end(cluster, "f0", A)) == [("r", A)]


def test_what_counts_of_a_complete_text_goes_along():
    cluster = make_cluster(A)
    arrive(cluster, "r")
    assert cluster.handle(Cancelled(RequestId("r"), 5), 0.0) == [Abort(RequestId("r"), A, 5)]


def test_a_word_about_a_stranger_is_nothing():
    cluster = make_cluster(A)
    arrive(cluster, "r")
    before = cluster.state()
    for event in (
        FirstToken(RequestId("s"), A),
        FirstToken(RequestId("r"), B),
        Ended(RequestId("s"), A),
        Ended(RequestId("r"), B),
        Cancelled(RequestId("s")),
        InstanceDown(B),
        InstanceDraining(B),
        MoveAway(B),
        Reported(B, make_view()),
        Elapsed(),
    ):
        assert cluster.handle(event, 0.0) == []
    assert cluster.state() == before


# --- instances go ---


def test_what_a_lost_instance_ran_goes_on_elsewhere():
    cluster = make_cluster(A, B, max_num_running=4)
    fill(cluster, 4)
    assert sent(cluster.handle(InstanceDown(A), 0.0)) == [("f0", B), ("f2", B)]
    assert A not in cluster.ledgers()
    assert cluster.num_assigned(A) == 0
    assert end(cluster, "f0", A) == [], "a late word from the dead"
    assert cluster.owner(RequestId("f0")) == B


def test_what_was_lost_goes_before_what_came_later():
    cluster = make_cluster(A)
    fill(cluster, 3)
    arrive(cluster, "r")
    assert cluster.handle(InstanceDown(A), 0.0) == []
    up = cluster.handle(InstanceUp(A, make_capacity()), 0.0)
    assert sent(up) == [("f0", A), ("f1", A), ("f2", A)]
    assert cluster.state()["queued"] == ["r"]


def test_what_nobody_waits_for_does_not_go_on():
    cluster = make_cluster(A, B)
    fill(cluster, 1)
    cluster.handle(Cancelled(RequestId("f0")), 0.0)
    assert cluster.handle(InstanceDown(A), 0.0) == []
    assert sent(arrive(cluster, "f0")) == [("f0", B)], "its name is free again"


def test_without_an_instance_those_that_wait_are_failed_after_the_limit():
    cluster = make_cluster(A, continuation_timeout_s=10.0)
    fill(cluster, 3)
    arrive(cluster, "r")
    assert cluster.handle(InstanceDown(A), 5.0) == []
    assert cluster.handle(Elapsed(), 14.9) == []
    failed = cluster.handle(Elapsed(), 15.0)
    names = [RequestId(name) for name in ("f0", "f1", "f2", "r")]
    assert sorted(action.request_id for action in failed) == names
    assert {action.reason for action in failed} == {FailReason.NO_INSTANCE}
    assert cluster.num_queued == 0


def test_the_limit_begins_anew_with_each_time_that_no_instance_is_there():
    cluster = make_cluster(A, continuation_timeout_s=10.0)
    fill(cluster, 1)
    cluster.handle(InstanceDown(A, was_ours=True), 0.0)
    assert sent(cluster.handle(InstanceUp(A, make_capacity()), 9.0)) == [("f0", A)]
    assert cluster.handle(InstanceDown(A, was_ours=True), 20.0) == []
    assert cluster.handle(Elapsed(), 29.0) == []
    assert cluster.handle(Elapsed(), 30.0) == [Fail(RequestId("f0"), FailReason.NO_INSTANCE)]


def test_the_limit_holds_too_while_the_last_instance_drains():
    """It may drain and stay: those that wait here must not wait for ever."""
    cluster = make_cluster(A, continuation_timeout_s=10.0)
    fill(cluster, 3)
    arrive(cluster, "r")
    assert cluster.handle(InstanceDraining(A), 5.0) == []
    for name in ("f0", "f1", "f2"):
        assert end(cluster, name, A) == []
    assert cluster.handle(Elapsed(), 15.0) == [Fail(RequestId("r"), FailReason.NO_INSTANCE)]


def test_what_fits_none_of_those_left_is_failed_and_holds_up_nobody():
    cluster = make_cluster(A, max_num_running=1)
    cluster.handle(InstanceUp(B, make_capacity(max_num_running=1, max_model_len=16)), 0.0)
    arrive(cluster, "long", prompt=range(20))
    for index in range(5):
        arrive(cluster, f"s{index}")
    lost = cluster.handle(InstanceDown(A), 0.0)
    assert Fail(RequestId("long"), FailReason.NO_INSTANCE) in lost
    assert cluster.owner(RequestId("long")) is None


def test_a_new_incarnation_takes_over_from_one_whose_end_nobody_told():
    cluster = make_cluster(A)
    fill(cluster, 2)
    again = cluster.handle(InstanceUp(A, make_capacity()), 0.0)
    assert sent(again) == [("f0", A), ("f1", A)]
    assert cluster.num_assigned(A) == 2


# --- draining and moving ---


def test_one_that_drains_gets_nothing_new_and_ends_what_it_has():
    cluster = make_cluster(A, B)
    fill(cluster, 2)
    cluster.handle(InstanceDraining(A), 0.0)
    assert sent(arrive(cluster, "r") + arrive(cluster, "s")) == [("r", B), ("s", B)]
    assert arrive(cluster, "t") == []
    assert cluster.num_assigned(A) == 1
    assert end(cluster, "f0", A) == []
    assert cluster.num_assigned(A) == 0
    assert A in cluster.ledgers()


def test_the_fleet_that_drains_still_dispatches_what_waits():
    cluster = make_cluster(A)
    fill(cluster, 3)
    arrive(cluster, "r")
    assert cluster.handle(DrainStarted(), 0.0) == []
    assert sent(end(cluster, "f0", A)) == [("r", A)]


def test_what_is_moved_away_goes_on_elsewhere_at_once():
    cluster = make_cluster(A, B)
    fill(cluster, 2)
    cluster.handle(InstanceDraining(A), 0.0)
    moved = cluster.handle(MoveAway(A), 0.0)
    assert moved == [Abort(RequestId("f0"), A), Dispatch(make_spec("f0"), B)]
    assert cluster.owner(RequestId("f0")) == B
    assert cluster.num_assigned(A) == 1, "until it says that it ended"
    end(cluster, "f0", A)
    assert cluster.num_assigned(A) == 0
    assert cluster.owner(RequestId("f0")) == B


def test_what_is_moved_away_is_not_sent_back_before_it_was_let_go():
    cluster = make_cluster(A)
    fill(cluster, 1)
    assert cluster.handle(MoveAway(A), 0.0) == [Abort(RequestId("f0"), A)]
    assert cluster.num_queued == 1
    assert sent(end(cluster, "f0", A)) == [("f0", A)]


def test_what_was_cancelled_is_not_moved():
    cluster = make_cluster(A, B)
    fill(cluster, 1)
    cluster.handle(Cancelled(RequestId("f0")), 0.0)
    assert cluster.handle(MoveAway(A), 0.0) == []
    assert cluster.owner(RequestId("f0")) == A


def test_what_was_moved_and_cancelled_is_gone_here_and_its_name_is_free():
    cluster = make_cluster(A)
    fill(cluster, 1)
    cluster.handle(MoveAway(A), 0.0)
    assert cluster.handle(Cancelled(RequestId("f0")), 0.0) == []
    assert arrive(cluster, "f0") == [], "its old self is still there"
    assert sent(end(cluster, "f0", A)) == [("f0", A)]


# --- prefixes and what others may know ---


def test_the_same_beginning_goes_to_the_same_instance_until_that_is_too_busy():
    cluster = make_cluster(A, B, max_num_running=8, prefix_affinity=True)
    prompt = range(100)  # one chunk: worth one request
    assert fill(cluster, 3, prompt=prompt) == [("f0", A), ("f1", A), ("f2", B)]


def test_many_of_one_cached_prompt_are_let_in_at_once():
    """Room is what is to be computed, and of what is cached there that is next to nothing."""
    cluster = make_cluster(dispatch="freeness", prefix_affinity=True)
    capacity = make_capacity(
        max_num_running=64, max_num_waiting_tokens=4096, max_model_len=4096, num_blocks=4096
    )
    cluster.handle(InstanceUp(A, capacity), 0.0)
    prefix = range(1500)
    arrive(cluster, "first", prompt=prefix)
    cluster.handle(FirstToken(RequestId("first"), A), 0.0)
    for number in range(48):
        prompt = (*prefix, *range(2000 + 20 * number, 2020 + 20 * number))
        assert sent(arrive(cluster, f"r{number}", prompt=prompt)) == [(f"r{number}", A)]
    # Without a cache two keep it busy: it is the third that waits.
    uncached = make_cluster(dispatch="freeness", prefix_caching=False)
    uncached.handle(InstanceUp(A, capacity), 0.0)
    assert len(fill(uncached, 48, prompt=prefix)) == 3


def test_what_an_instance_had_computed_is_gone_with_it():
    cluster = make_cluster(A, B, prefix_affinity=True)
    prompt = range(100)
    arrive(cluster, "r", prompt=prompt)
    end(cluster, "r", A)
    cluster.handle(InstanceDown(A), 0.0)
    cluster.handle(InstanceUp(A, make_capacity()), 0.0)
    sent(arrive(cluster, "s", prompt=range(500, 503)))
    assert sent(arrive(cluster, "t", prompt=prompt)) == [("t", B)]


def test_a_report_changes_what_is_known_and_dispatches_nothing():
    cluster = make_cluster(A, B, dispatch="freeness")
    view = make_view(num_running=2, num_free_blocks=4)
    assert cluster.handle(Reported(A, view), 0.0) == []
    assert cluster.ledgers()[A].view == view
    assert sent(arrive(cluster, "r")) == [("r", B)]
    cluster.handle(InstanceDown(A), 0.0)
    assert cluster.ledgers().keys() == {B}


@pytest.mark.parametrize("dispatch", ["round_robin", "least_loaded", "freeness"])
def test_a_burst_within_one_report_spreads_evenly(dispatch):
    cluster = make_cluster(A, B, C, max_num_running=64, dispatch=dispatch)
    for instance_id in (A, B, C):
        cluster.handle(Reported(instance_id, make_view()), 0.0)
    fill(cluster, 64)
    numbers = [cluster.num_assigned(instance_id) for instance_id in (A, B, C)]
    assert sum(numbers) == 64
    assert max(numbers) - min(numbers) <= 1


def test_without_the_ledger_a_burst_herds():
    cluster = make_cluster(A, B, max_num_running=64, uses_ledger=False)
    assert {instance_id for _, instance_id in fill(cluster, 20)} == {A}


def test_random_policies_draw_from_the_seed():
    def went(seed):
        cluster = make_cluster(
            A, B, C, dispatch="power_of_two", seed=seed, uses_ledger=False, max_num_running=64
        )
        return fill(cluster, 40)

    assert went(1) == went(1)
    assert went(1) != went(2)
    assert {instance_id for _, instance_id in went(1)} == {A, B}, "the last of equals never wins"


def test_the_state_is_plain_data():
    cluster = make_cluster(A)
    fill(cluster, 3)
    arrive(cluster, "r")
    assert cluster.state() == {
        "draining": False,
        "instances": {
            "a": {
                "num_assigned": 3,
                "num_waiting_tokens": 9,
                "freeness": 256.0,
                "draining": False,
                "trial": None,
            }
        },
        "assigned": {"f0": "a", "f1": "a", "f2": "a"},
        "queued": ["r"],
        "doubtful": [],
        "num_quarantined": 0,
    }
