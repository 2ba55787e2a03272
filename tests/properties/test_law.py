"""The one law, with the checksum executor: any company, chunking and preemption, same tokens."""

from __future__ import annotations

from tests.properties.law import check_law

NUM_SCHEDULES = 500


def test_tokens_equal_the_solo_run_in_500_random_schedules():
    outcomes = [check_law(seed) for seed in range(NUM_SCHEDULES)]
    # The schedules must really have been hostile, or the law was not tested.
    assert sum(outcome.num_preemptions for outcome in outcomes) > NUM_SCHEDULES
    assert sum("abort" in outcome.finished.values() for outcome in outcomes) > NUM_SCHEDULES / 10
