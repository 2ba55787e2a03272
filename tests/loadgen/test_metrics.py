"""Each measure against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.distribution import distribution, samples_needed
from loadgen.fairness import fairness, jain_index
from loadgen.metrics import Slo, summarize
from loadgen.report import words
from loadgen.types import LoadError
from tests.loadgen.results import answer, failure, run_of


def test_latencies_count_from_the_intended_time():
    # Meant for 1.0, sent at 1.2; text at 1.5, 1.6 and 1.9; three tokens; ended at 2.0.
    summary = summarize(run_of(answer(1.0, 1.2, [1.5, 1.6, 1.9], 2.0)))
    assert summary.ttft.mean_s == pytest.approx(0.5)
    assert summary.tpot.mean_s == pytest.approx(0.4 / 2)
    assert (summary.itl.num, summary.itl.mean_s) == (2, pytest.approx(0.2))
    assert summary.itl.std_s == pytest.approx(0.1)  # of 0.1 and 0.3
    assert summary.e2e.max_s == pytest.approx(1.0)


def test_a_failed_request_keeps_what_was_measured_of_it():
    summary = summarize(
        run_of(answer(0.0, 0.0, [0.1, 0.2], 0.3), failure(0.0, 0.0, [0.3, 0.6], 0.7))
    )
    assert (summary.ttft.num, summary.itl.num) == (2, 2)
    assert (summary.tpot.num, summary.e2e.num) == (1, 1)


def test_percentiles_interpolate_and_the_tail_needs_ten_samples_beyond():
    hundred = distribution(range(101))
    assert (hundred.p50_s, hundred.p90_s, hundred.max_s) == (50, 90, 100)
    assert hundred.refused == ("p95", "p99", "p99.9")
    assert (hundred.p95_s, hundred.p99_s, hundred.p999_s) == (None, None, None)
    assert distribution([3.0]).p50_s == 3.0
    assert distribution([]).refused == ()


@pytest.mark.parametrize(
    ("name", "needed"),
    [("p50", 1), ("p90", 100), ("p95", 200), ("p99", 1_000), ("p99.9", 10_000)],
)
def test_a_percentile_is_given_from_its_number_of_samples_on(name, needed):
    assert samples_needed(name) == needed
    assert distribution(range(needed)).percentile_s(name) is not None
    assert distribution(range(needed - 1)).percentile_s(name) is None


def test_throughput_is_of_what_succeeded_over_the_whole_run():
    summary = summarize(
        run_of(
            answer(0.0, 0.0, [1.0, 2.0], 2.0, prompt=30, cached=10),
            answer(0.0, 0.0, [1.0], 4.0, prompt=10, output=4),
            failure(0.0, 0.0, [1.0], 2.0, prompt=50),
            duration_s=4.0,
        )
    )
    done = summary.throughput
    assert (done.num_requests, done.num_ok, done.requests_per_s) == (3, 2, 0.5)
    assert (done.input_tokens_per_s, done.output_tokens_per_s) == (10.0, 1.5)
    assert (done.num_cached_tokens, done.hit_rate) == (10, 0.25)
    assert done.tokens_per_event == 2.0


@pytest.mark.parametrize(
    ("cached", "num_cached", "hit_rate"),
    [((None, None), None, None), ((None, 4), 4, 0.25), ((0, 0), 0, 0.0), ((None, 0), 0, 0.0)],
)
def test_what_no_answer_tells_of_the_cache_is_unknown(cached, num_cached, hit_rate):
    records = [answer(0.0, 0.0, [0.1], 0.2, cached=it) for it in cached]
    done = summarize(run_of(*records)).throughput
    assert (done.num_cached_tokens, done.hit_rate) == (num_cached, hit_rate)


def test_goodput_needs_every_objective_and_success():
    slo = Slo.parse(["ttft:500", "itl:300"])
    good = answer(0.0, 0.0, [0.5, 0.75], 0.75)
    late = answer(0.0, 0.0, [0.6, 0.7], 0.7)
    halting = answer(0.0, 0.0, [0.1, 0.2, 0.55], 0.6)
    single = answer(0.0, 0.0, [0.4], 0.4)  # has no gap to judge
    silent = answer(0.0, 0.0, [], 0.6)  # no text: its TTFT is its end
    broken = failure(0.0, 0.0, [0.1], 0.1)
    run = run_of(good, late, halting, single, silent, broken, duration_s=2.0)
    goodput = summarize(run, slo).goodput
    assert (goodput.num_good, goodput.requests_per_s) == (2, 1.0)
    assert goodput.share == pytest.approx(2 / 6)


@pytest.mark.parametrize("word", ["ttft", "ttft:", "speed:3", "tpot:-1", "e2e:soon", "itl:nan"])
def test_an_objective_that_is_none_is_refused(word):
    with pytest.raises(LoadError) as caught:
        Slo.parse(["ttft:200", word])
    assert word in caught.value.cause
    assert "milliseconds" in caught.value.remedy


def test_errors_are_counted_by_class_the_most_frequent_first():
    failures = [failure(0, 0, [], 1, error="timeout"), failure(0, 0, [], 1, error="http_429")]
    failures += [failure(0, 0, [], 1, error="http_429", detail="slow down")]
    errors = summarize(run_of(*failures)).errors
    assert [(e.name, e.num, e.example) for e in errors] == [
        ("http_429", 2, "slow down"),
        ("timeout", 1, ""),
    ]


def test_a_stall_is_a_gap_over_a_second_or_ten_medians():
    times = [0.0, 0.2, 0.4, 0.6, 1.7, 4.0]  # gaps: 0.2 three times, 1.1 and 2.3; ten medians are 2
    slow = summarize(run_of(answer(0.0, 0.0, times, 5.0))).stalls
    assert (slow.threshold_s, slow.num) == (pytest.approx(2.0), 1)
    assert slow.longest_s == pytest.approx(2.3)
    fast = summarize(run_of(answer(0.0, 0.0, [0.0, 0.01, 0.02, 1.1], 2.0))).stalls
    assert (fast.threshold_s, fast.num, fast.num_requests) == (1.0, 1, 1)
    given_s = summarize(run_of(answer(0.0, 0.0, times, 5.0)), stall_s=1.0).stalls
    assert given_s.num == 2


@pytest.mark.parametrize(("shortfall", "fell_behind"), [(0.009, False), (0.012, True)])
def test_a_generator_that_sends_too_slowly_says_so(shortfall, fell_behind):
    # Meant each 10 ms for 10 s; sent at (1 - shortfall) of that rate.
    intended = [0.01 * i for i in range(1001)]
    sent = [at / (1 - shortfall) for at in intended]
    records = [answer(i, s, [s + 1], s + 1) for i, s in zip(intended, sent, strict=True)]
    lags = tuple(s - i for i, s in zip(intended, sent, strict=True))
    lag = summarize(run_of(*records, lags_s=lags)).lag
    assert lag.behind == pytest.approx(0.99 * shortfall, rel=0.02)
    assert lag.fell_behind is fell_behind


def test_one_hiccup_is_no_shortfall_and_a_closed_loop_has_no_lag():
    records = [answer(0.1 * i, 0.1 * i, [20.0], 20.0) for i in range(200)]
    lags = (0.9,) + (0.0,) * 199  # one late request; the lag's p99 is near zero
    assert not summarize(run_of(*records, lags_s=lags)).lag.fell_behind
    assert summarize(run_of(*records)).lag is None


@pytest.mark.parametrize(("lag_s", "fell_behind"), [(0.0005, False), (0.4, True)])
def test_requests_that_were_meant_at_once_and_went_out_late_are_told(lag_s, fell_behind):
    records = [answer(0.0, lag_s, [lag_s + 0.01], 1.0) for _ in range(50)]
    summary = summarize(run_of(*records, lags_s=(lag_s,) * 50))
    assert summary.lag.fell_behind is fell_behind
    told = " ".join(words.warnings(summary))
    assert ("fell behind by its whole plan" in told) is fell_behind


def test_an_empty_run_has_a_summary():
    summary = summarize(run_of(duration_s=0.0), Slo(ttft_s=1.0))
    assert summary.throughput.requests_per_s == 0.0
    assert summary.goodput.share == 0.0
    assert (summary.ttft.num, summary.ttft.mean_s) == (0, None)
    assert summary.fairness.tenants == ()


def test_a_summary_is_json():
    run = run_of(answer(0.0, 0.1, [0.5, 0.7], 0.9), lags_s=(0.1,))
    document = json.loads(json.dumps(asdict(summarize(run, Slo(ttft_s=1.0))), allow_nan=False))
    assert document["ttft"]["mean_s"] == 0.5


def test_jains_index_of_the_papers_examples():
    assert jain_index([5, 5, 5]) == 1.0
    assert jain_index([1, 0, 0, 0]) == 0.25
    assert jain_index([1, 3]) == pytest.approx(16 / 20)
    assert jain_index([]) is None
    assert jain_index([0, 0]) is None


@given(st.lists(st.floats(0.001, 1e9), min_size=1, max_size=20), st.floats(0.001, 1000))
def test_jains_index_has_its_range_and_no_unit(shares, unit):
    index = jain_index(shares)
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9
    assert index == pytest.approx(jain_index([unit * share for share in shares]))


def test_service_counts_a_prompt_at_its_first_text_and_outputs_as_they_come():
    record = answer(0.0, 0.0, [1.0, 3.0], 4.0, prompt=10, output=4, tenant="a")
    fair = fairness([record], duration_s=4.0)
    (tenant,) = fair.tenants
    over_time = dict(zip(fair.times_s, tenant.service_over_time, strict=True))
    assert [over_time[at] for at in (fair.times_s[0], fair.times_s[-1])] == [0.0, 10 + 2 * 4]
    middle = [w for at, w in over_time.items() if 1.0 <= at < 3.0]
    assert set(middle) == {10 + 2 * 2}
    assert tenant.service == 18.0
    assert fair.largest_gap is None


def test_the_gap_is_of_the_time_in_which_both_are_backlogged():
    # b waits from 2 to 6. Before that a alone receives 100 + 2, which is no unfairness; within, a
    # receives 2 + 2 x 4 = 10 more than b; at 5 b receives 50 + 2, so the lead falls by 52.
    first = answer(0.0, 0.0, [1.0], 4.5, prompt=100, output=1, tenant="a")
    second = answer(1.0, 1.0, [3.0, 4.0], 7.0, prompt=2, output=4, tenant="a")
    other = answer(2.0, 2.0, [5.0], 6.0, prompt=50, output=1, tenant="b")
    gap = fairness([first, second, other], duration_s=7.0).largest_gap
    assert (gap.tenants, gap.service) == (("a", "b"), 52.0)
    assert (gap.start_s, gap.end_s) == (2.0, 6.0)


def test_weights_divide_service():
    records = [
        answer(0.0, 0.0, [1.0], 2.0, prompt=40, output=0, tenant="heavy"),
        answer(0.0, 0.0, [1.0], 2.0, prompt=20, output=0, tenant="light"),
    ]
    assert fairness(records, 2.0).jain_index == pytest.approx(60**2 / (2 * (40**2 + 20**2)))
    weighted = fairness(records, 2.0, {"heavy": 2.0})
    assert weighted.jain_index == 1.0
    assert weighted.largest_gap.service == 0.0


def test_tenants_that_take_turns_have_no_gap():
    records = [
        answer(0.0, 0.0, [1.0], 1.0, tenant="a"),
        answer(1.0, 1.0, [2.0], 2.0, tenant="b"),
    ]
    assert fairness(records, 2.0).largest_gap is None


@st.composite
def answers(draw):
    times = sorted(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    end = times[-1] + draw(st.integers(0, 2))
    prompt, tenant = draw(st.integers(0, 5)), draw(st.sampled_from("ab"))
    return answer(times[0], times[0], times, end, prompt=prompt, tenant=tenant)


@given(st.lists(answers(), min_size=2, max_size=8))
def test_the_largest_gap_is_that_of_a_search_over_all_pairs_of_times(records):
    found = fairness(records, 8.0).largest_gap
    assert (found.service if found else None) == slow_largest_gap(records)


def slow_largest_gap(records):
    """Try every two of the whole seconds between which both are backlogged all the time."""

    def lead(end):  # of a, over all steps at times for which `end` holds
        return sum(
            (1 if record.tenant == "a" else -1) * (2 + (place == 0) * record.num_prompt_tokens)
            for record in records
            for place, time_s in enumerate(record.received_at_s)
            if end(time_s)
        )

    def backlogged(tenant, second):
        mine = [record for record in records if record.tenant == tenant]
        return any(r.sent_at_s <= second and second + 1 <= r.end_at_s for r in mine)

    before = [lead(lambda at, now=now: at < now) for now in range(10)]
    after = [lead(lambda at, now=now: at <= now) for now in range(10)]
    both = [backlogged("a", second) and backlogged("b", second) for second in range(9)]
    gaps = [
        abs(later - earlier)
        for start in range(9)
        for end in range(start + 1, 10)
        if all(both[start:end])
        for earlier in (before[start], after[start])
        for later in (before[end], after[end])
    ]
    return max(gaps, default=None)
