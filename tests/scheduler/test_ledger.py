"""The ledger: what an instance is thought to have, between its reports; and its freeness."""

from __future__ import annotations

from scheduler.cluster.ledger import Ledger
from scheduler.types import InstanceId, RequestId
from tests.factories import make_capacity, make_view

R = [RequestId(f"r{index}") for index in range(12)]
M = 64 * 4  # tokens that the memory holds


def make_ledger(*, is_trusted=True, headroom_tokens=0, **limits):
    return Ledger(
        InstanceId("a"),
        make_capacity(**limits),
        is_trusted=is_trusted,
        headroom_tokens=headroom_tokens,
    )


def reported(**facts):
    ledger = make_ledger()
    ledger.report(make_view(**facts))
    return ledger


# --- freeness: (M - the virtual usage of all) / B ---


def test_freeness_is_the_free_tokens_by_request_that_takes_one_a_step():
    assert reported(num_running=4, num_free_blocks=24).freeness == 24 * 4 / 4


def test_the_first_that_waits_counts_with_all_that_it_demands():
    ledger = reported(num_running=3, num_free_blocks=20, num_waiting=1, num_head_blocks=12)
    assert ledger.freeness == (20 - 12) * 4 / (3 + 1)


def test_others_that_wait_count_nothing():
    one = reported(num_running=3, num_free_blocks=20, num_waiting=1, num_head_blocks=12)
    many = reported(
        num_running=3, num_free_blocks=20, num_waiting=9, num_head_blocks=12, num_waiting_tokens=400
    )
    assert many.freeness == one.freeness


def test_for_a_dispatch_all_that_waits_counts_in_memory_and_in_the_batch():
    ledger = reported(
        num_running=3, num_free_blocks=20, num_waiting=2, num_head_blocks=1, num_waiting_tokens=17
    )
    assert ledger.load().freeness == (20 - 5) * 4 / (3 + 2)


def test_freeness_is_negative_when_what_waits_needs_more_than_is_free():
    ledger = reported(num_running=2, num_free_blocks=1, num_waiting=1, num_head_blocks=10)
    assert ledger.freeness == (1 - 10) * 4 / 3


def test_one_that_drains_has_less_than_any_freeness():
    ledger = reported()
    ledger.drain()
    assert ledger.freeness == ledger.load().freeness == float("-inf")


def test_an_empty_batch_counts_as_one():
    assert reported().freeness == M
    assert make_ledger().freeness == M, "before the first report it is taken to be empty"


def test_what_was_sent_and_is_in_no_report_yet_counts_for_a_dispatch_in_whole_blocks():
    ledger = reported(num_running=1, num_free_blocks=60)
    ledger.send(R[0], 0, 5)
    ledger.send(R[1], 0, 4)
    assert ledger.load().freeness == (60 - 2 - 1) * 4 / (1 + 2)
    assert ledger.freeness == 60 * 4 / 1


def test_a_report_covers_as_many_of_those_sent_as_the_instance_was_given():
    ledger = make_ledger()
    for index in range(3):
        ledger.send(R[index], 0, 8)
    ledger.report(make_view(num_given=2, num_running=2, num_free_blocks=60))
    assert ledger.load().freeness == (60 - 2) * 4 / (2 + 1)
    ledger.report(make_view(num_given=3, num_running=3, num_free_blocks=58))
    assert ledger.load().freeness == 58 * 4 / 3
    ledger.send(R[3], 0, 8)  # the count goes on; it does not begin again with each report
    ledger.report(make_view(num_given=3, num_running=2, num_free_blocks=60))
    assert ledger.load().freeness == (60 - 2) * 4 / (2 + 1)


def test_those_of_high_priority_keep_a_headroom_that_they_share():
    ledger = make_ledger(headroom_tokens=39)
    ledger.report(make_view(num_running=4, num_free_blocks=24))
    ledger.send(R[0], 0, 4)
    assert (ledger.freeness, ledger.load().freeness) == (24, 23 * 4 / 5), "none is there"
    for request_id in R[1:3]:
        ledger.send(request_id, -1, 4)
    assert (ledger.freeness, ledger.load().freeness) == (24 - 10, (24 - 3 - 10) * 4 / 7)
    for request_id in R[1:3]:
        assert ledger.freeness == 24 - 10
        ledger.ended(request_id)
    assert ledger.freeness == 24


# --- the load that policies see ---


def test_the_load_counts_all_that_is_owed_an_end_whatever_was_reported():
    ledger = make_ledger()
    ledger.send(R[0], 0, 5)
    ledger.send(R[1], 7, 6)
    ledger.report(make_view())
    assert ledger.load() == ("a", 2, 2, 11, ledger.load().freeness)
    ledger.began(R[0])
    assert ledger.load()[:4] == ("a", 2, 2, 6)
    ledger.ended(R[0])
    assert ledger.load()[:4] == ("a", 1, 2, 6)
    ledger.ended(R[1])
    assert ledger.load()[:4] == ("a", 0, 2, 0)


def test_beginning_or_ending_twice_counts_once_and_strangers_count_nothing():
    ledger = make_ledger()
    ledger.send(R[0], 0, 5)
    ledger.send(R[1], 0, 7)
    for _ in range(2):
        ledger.began(R[0])
        ledger.ended(R[2])
        ledger.began(R[3])
    assert ledger.load()[:4] == ("a", 2, 2, 7)
    for _ in range(2):
        ledger.ended(R[0])
        assert ledger.load()[:4] == ("a", 1, 2, 7)


def test_without_the_ledger_the_load_is_what_was_reported_last():
    ledger = make_ledger(is_trusted=False)
    ledger.send(R[0], 0, 40)
    assert ledger.load() == ("a", 0, 2, 0, M)
    ledger.report(make_view(num_running=2, num_waiting=1, num_waiting_tokens=8, num_free_blocks=40))
    ledger.send(R[1], 0, 40)
    assert ledger.load() == ("a", 3, 2, 0, (40 - 2) * 4 / 3)


# --- room ---


def test_there_is_room_for_those_that_run_and_a_quarter_more():
    ledger = make_ledger(max_num_running=8)
    for index in range(8 + 2):
        assert ledger.has_room(0)
        ledger.send(R[index], 0, 1)
    assert not ledger.has_room(0)
    ledger.began(R[0])
    assert not ledger.has_room(0), "it still runs"
    ledger.ended(R[0])
    assert ledger.has_room(0)


def test_the_smallest_instance_has_room_for_a_successor():
    ledger = make_ledger(max_num_running=1)
    ledger.send(R[0], 0, 1)
    assert ledger.has_room(0)
    ledger.send(R[1], 0, 1)
    assert not ledger.has_room(0)


def test_no_more_comes_while_enough_waits_to_keep_it_busy():
    ledger = make_ledger(max_num_running=8, max_num_waiting_tokens=100)
    ledger.send(R[0], 0, 99)
    assert ledger.has_room(0)
    ledger.send(R[1], 0, 4000)  # of whatever length
    assert not ledger.has_room(0)
    ledger.began(R[1])
    assert ledger.has_room(0)
    ledger.began(R[0])
    assert ledger.has_room(0)


def test_one_that_ends_without_a_token_waits_no_more():
    ledger = make_ledger(max_num_waiting_tokens=100)
    ledger.send(R[0], 0, 100)
    assert not ledger.has_room(0)
    ledger.ended(R[0])
    assert ledger.has_room(0)


def test_those_of_a_higher_rank_number_take_no_room():
    ledger = make_ledger(max_num_running=1, max_num_waiting_tokens=10)
    ledger.send(R[0], 5, 10)
    ledger.send(R[1], 5, 10)
    assert not ledger.has_room(5)
    assert not ledger.has_room(6)
    assert ledger.has_room(4)
    ledger.send(R[2], 4, 10)
    assert not ledger.has_room(4)
    assert ledger.has_room(-1)


def test_a_load_that_was_asked_for_is_not_kept_beyond_the_next_change():
    ledger = make_ledger()
    changes = (
        lambda: ledger.send(R[0], 0, 40),
        lambda: ledger.report(make_view(num_free_blocks=9)),
        lambda: ledger.began(R[0]),
        lambda: ledger.ended(R[0]),
        ledger.drain,
    )
    for change in changes:
        before = ledger.load()
        change()
        assert ledger.load() != before


def test_one_that_drains_has_room_for_nobody():
    ledger = make_ledger()
    ledger.drain()
    assert not ledger.has_room(0)


def test_urgent_ones_find_no_more_room_than_for_twice_as_many():
    ledger = make_ledger(max_num_running=2, max_num_waiting_tokens=1)
    for index in range(6):
        assert ledger.has_room(-index)
        ledger.send(R[index], -index, 1)
    assert not ledger.has_room(-6)


# --- trials ---


def test_one_is_free_for_a_trial_when_nobody_waits_and_not_all_run():
    ledger = make_ledger(max_num_running=2)
    assert ledger.is_free(0)
    ledger.send(R[0], 0, 1)
    assert not ledger.is_free(0)
    assert not ledger.is_free(1)
    assert ledger.is_free(-1), "it would go before that"
    ledger.began(R[0])
    assert ledger.is_free(0)
    ledger.send(R[1], 0, 1)
    ledger.began(R[1])
    assert not ledger.is_free(0)
    ledger.ended(R[0])
    assert ledger.is_free(0)
    ledger.trial = R[1]
    assert not ledger.is_free(0)


def test_one_that_drains_is_not_free():
    ledger = make_ledger()
    ledger.drain()
    assert not ledger.is_free(0)


def test_nobody_comes_beside_one_on_trial_before_its_first_token():
    ledger = make_ledger(max_num_running=8)
    ledger.send(R[0], 0, 1)
    ledger.trial = R[0]
    assert not ledger.has_room(0)
    assert not ledger.has_room(-1)
    ledger.began(R[0])
    assert ledger.has_room(0)


def test_a_trial_is_over_with_its_end_and_nobody_elses():
    ledger = make_ledger()
    ledger.send(R[0], 0, 1)
    ledger.send(R[1], 0, 1)
    ledger.trial = R[0]
    ledger.ended(R[1])
    assert ledger.trial == R[0]
    ledger.ended(R[0])
    assert ledger.trial is None


def test_memory_is_what_was_reported_less_what_is_on_its_way_and_all_of_an_empty_one():
    ledger = make_ledger()
    assert ledger.has_memory(10_000)
    ledger.report(make_view(num_free_blocks=0))
    assert ledger.has_memory(10_000), "it only has cached prefixes, or the report is old"
    ledger.send(R[0], 0, 8)
    ledger.report(make_view(num_free_blocks=5))
    assert ledger.has_memory(3 * 4)
    assert not ledger.has_memory(3 * 4 + 1)
    ledger.report(make_view(num_free_blocks=5, num_given=1))
    assert ledger.has_memory(5 * 4)
