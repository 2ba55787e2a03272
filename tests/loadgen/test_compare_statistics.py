"""Comparisons of two arms: exact levels, power in simulated noise, the order of runs, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from loadgen.compare import signed_rank
from loadgen.compare.report import HEADER, comparison_rows, comparison_table
from loadgen.compare.statistics import (
    Comparison,
    Measure,
    compare,
    compare_pairs,
    schedule,
)
from loadgen.types import LoadError

SLOWDOWN = 1.05
STUDENT_12 = 2.201  # Student's t, 11 degrees of freedom, two-sided 5 %


def measure(a: Sequence[float | None], b: Sequence[float | None], name: str = "TTFT") -> Measure:
    return Measure(name=name, unit="s", a=a, b=b)


def compare_ratios(ratios: Sequence[float], alpha: float = 0.05) -> Comparison:
    return compare_pairs(measure([1.0] * len(ratios), list(ratios)), alpha=alpha)


def noisy(rng: np.random.Generator, num_runs: int, neighbour: bool = False) -> np.ndarray:
    """Log values with 2 % of noise; a neighbour makes one run in ten 1.5 to 3 times as slow."""
    values = 0.02 * rng.standard_normal(num_runs)
    if neighbour:
        hit = rng.random(num_runs) < 0.1
        values += hit * np.log(rng.uniform(1.5, 3.0, num_runs))
    return values


# --- exact cases ---------------------------------------------------------------------------------


def test_twelve_ratios_above_one():
    result = compare_ratios([1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08, 1.09, 1.1, 1.2, 1.3])
    assert result.p_value == 2 / 4096
    assert result.differs
    assert result.verdict.endswith("higher")


@pytest.mark.parametrize(
    ("below", "patterns"),
    [
        (0, 2),  # scores 1, 2, 3 and nine times 4: weight 1 has the patterns {}, {1}
        (1, 3),  # {}, {1}, {2}
        (2, 5),  # ..., {3}, {1, 2}
        (3, 15),  # ..., {1, 3}, and {4} nine times
        (11, 15),  # however far the one below lies: it counts no more than the fourth
    ],
)
def test_one_of_twelve_ratios_below_one(below, patterns):
    distances = [0.01 * (i + 1) for i in range(12)]
    ratios = [math.exp(-d if i == below else d) for i, d in enumerate(distances)]
    assert compare_ratios(ratios).p_value == 2 * patterns / 4096


def test_six_pairs_interval_is_their_range():
    result = compare_ratios([1.3, 1.01, 1.1, 1.02, 1.4, 1.2])
    assert result.interval == pytest.approx((1.01, 1.4), rel=1e-12)
    assert result.p_value == 2 / 64


def test_ratio_of_four_pairs_is_the_median_of_their_means_by_two():
    """Below five pairs no rank is cut. The ten means: 0 .5 1 1.5 2 | 3 5 5.5 6.5 10."""
    assert signed_rank.centre(np.array([3.0, 0.0, 10.0, 1.0])) == 2.5
    assert compare_ratios([1.0, math.e, math.e**3, math.e**10]).ratio == pytest.approx(math.e**2.5)


def test_equal_runs_show_nothing():
    result = compare_ratios([1.0] * 12)
    assert (result.ratio, result.interval, result.p_value) == (1.0, (1.0, 1.0), 1.0)
    assert result.verdict == "no difference shown"


def test_interval_that_touches_one_shows_nothing():
    result = compare_ratios([1.0, 1.1, 1.1, 1.2, 1.2, 1.3])
    assert result.interval == pytest.approx((1.0, 1.3))
    assert not result.differs
    assert result.p_value is not None
    assert result.p_value > 0.05


def test_the_same_ratio_in_every_pair():
    result = compare_ratios([1.05] * 12)
    assert result.interval == pytest.approx((1.05, 1.05))
    assert result.verdict == "B is 5.0% higher"


@pytest.mark.parametrize("num_pairs", [6, 8, 9])
def test_interval_is_the_test_inverted(num_pairs):
    """Against every pattern of signs, counted; on both sides of each limit."""
    rng = np.random.default_rng(num_pairs)
    patterns = np.array(list(itertools.product([0, 1], repeat=num_pairs)))
    scores = np.minimum(np.arange(1, num_pairs + 1), 4)

    def chance(differences: np.ndarray) -> float:
        ranked = differences[np.argsort(np.abs(differences))]
        weight = min(scores[ranked < 0].sum(), scores[ranked > 0].sum())
        return min(1.0, 2.0 * float(np.mean(patterns @ scores <= weight)))

    for _ in range(20):
        differences = rng.standard_normal(num_pairs)
        assert signed_rank.p_value(differences) == chance(differences)
        limits = signed_rank.interval(differences, 0.05)
        assert limits is not None
        low, high = limits
        assert chance(differences - (low - 1e-9)) <= 0.05 < chance(differences - (low + 1e-9))
        assert chance(differences - (high + 1e-9)) <= 0.05 < chance(differences - (high - 1e-9))
        assert low <= signed_rank.centre(differences) <= high


@pytest.mark.parametrize(
    ("num_pairs", "rejected"),
    # Weights of at most 0, 3, 5 reject: 1, 5, 21 patterns on either side.
    [(6, 2), (8, 10), (10, 42)],
)
def test_exact_level_over_all_signs(num_pairs, rejected):
    """Of all patterns of signs of any distances, outliers among them, at most 5 % are rejected."""
    distances = np.exp(np.random.default_rng(1).standard_normal(num_pairs) * 2.0)
    found = sum(
        compare_ratios(np.exp(0.01 * distances * signs).tolist()).differs
        for signs in itertools.product([-1.0, 1.0], repeat=num_pairs)
    )
    assert found == rejected
    assert found / 2**num_pairs <= 0.05


# --- simulated noise -----------------------------------------------------------------------------


def drifting_runs(rng: np.random.Generator, arm_b: float) -> tuple[list[float], list[float]]:
    """Twelve pairs in their scheduled order while the machine slows by 30 % and wanders by 1 %."""
    order = schedule(12, rng.integers(0, 2**31, 12).tolist())
    drift = np.linspace(0.0, 0.3, len(order)) + np.cumsum(0.01 * rng.standard_normal(len(order)))
    values = {"A": [0.0] * 12, "B": [0.0] * 12}
    noise = noisy(rng, len(order))
    for run, log_value in zip(order, drift + noise, strict=True):
        values[run.arm][run.pair] = math.exp(log_value) * (arm_b if run.arm == "B" else 1.0)
    return values["A"], values["B"]


def simulated_runs(
    rng: np.random.Generator, kind: str, arm_b: float
) -> tuple[list[float], list[float]]:
    if kind == "drift":
        return drifting_runs(rng, arm_b)
    if kind == "lognormal":
        a, b = 0.012 * np.exp(rng.standard_normal((2, 12)))
    else:
        a, b = (noisy(rng, 12, neighbour=kind == "neighbour") for _ in range(2))
    return np.exp(a).tolist(), (np.exp(b) * arm_b).tolist()


@pytest.mark.parametrize(
    ("kind", "least_false", "most_false", "least_found"),
    [
        ("normal", 0.02, 0.07, 0.97),
        ("lognormal", 0.02, 0.07, 0.95),
        ("drift", 0.0, 0.07, 0.95),
        ("neighbour", 0.02, 0.07, 0.75),
    ],
)
def test_coverage_and_power(kind, least_false, most_false, least_found):
    """The exact level of 12 pairs is 4.8 %; 600 comparisons measure it to 0.9 points."""
    rng = np.random.default_rng(7)
    missed = found = 0
    num = 600
    for _ in range(num):
        a, b = simulated_runs(rng, kind, SLOWDOWN)
        result = compare_pairs(measure(a, b))
        assert result.interval is not None
        missed += not result.interval[0] <= SLOWDOWN <= result.interval[1]
        found += result.interval[0] > 1.0
    assert least_false <= missed / num <= most_false
    assert found / num >= least_found


def test_finds_under_neighbours_what_a_mean_misses():
    rng = np.random.default_rng(3)
    found = found_by_mean = 0
    for _ in range(300):
        a, b = simulated_runs(rng, "neighbour", SLOWDOWN)
        found += compare_pairs(measure(a, b)).differs
        log_ratios = np.log(b) - np.log(a)
        error = log_ratios.std(ddof=1) / math.sqrt(12)
        found_by_mean += abs(log_ratios.mean()) > STUDENT_12 * error
    assert found > 0.75 * 300
    assert found_by_mean < 0.3 * 300


# --- invariance ----------------------------------------------------------------------------------


def test_swapped_arms_invert_everything():
    rng = np.random.default_rng(5)
    for num_pairs in (6, 11, 12):
        a = np.exp(noisy(rng, num_pairs, neighbour=True)).tolist()
        b = (1.02 * np.exp(noisy(rng, num_pairs, neighbour=True))).tolist()
        there, back = compare_pairs(measure(a, b)), compare_pairs(measure(b, a))
        assert there.ratio is not None
        assert there.interval is not None
        assert back.ratio == pytest.approx(1 / there.ratio, rel=1e-12)
        assert back.interval == pytest.approx(
            (1 / there.interval[1], 1 / there.interval[0]), rel=1e-12
        )
        assert back.p_value == there.p_value


def test_units_and_order_of_pairs_do_not_matter():
    rng = np.random.default_rng(6)
    a, b = np.exp(noisy(rng, 12)), np.exp(noisy(rng, 12))
    one = compare_pairs(measure(a.tolist(), b.tolist()))
    other = compare_pairs(measure((1e3 * a[::-1]).tolist(), (1e3 * b[::-1]).tolist()))
    assert other.ratio == pytest.approx(one.ratio, rel=1e-9)
    assert other.interval == pytest.approx(one.interval, rel=1e-9)


def test_an_outlier_cannot_move_the_ratio_far():
    ratios = [1.04, 1.045, 1.05, 1.05, 1.055, 1.06, 1.05, 1.05, 1.05, 1.05, 1.05]
    calm = compare_ratios([*ratios, 1.05]).ratio
    assert compare_ratios([*ratios, 50.0]).ratio == pytest.approx(calm, rel=0.005)


# --- the order of runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [2, 6, 12, 30])
def test_schedule_is_blocks_of_abba_and_their_mirror(num_pairs):
    order = schedule(num_pairs, range(100, 100 + num_pairs))
    arms = "".join(run.arm for run in order)
    blocks = [arms[i : i + 4] for i in range(0, len(arms), 4)]
    assert set(blocks) <= {"ABBA", "BAAB"}
    assert blocks.count("BAAB") == len(blocks) // 2
    for pair, (first, second) in enumerate(zip(order[::2], order[1::2], strict=True)):
        assert {first.arm, second.arm} == {"A", "B"}
        assert first.seed == second.seed == 100 + pair
        assert first.pair == second.pair == pair


def test_schedule_is_a_function_of_the_seeds():
    assert schedule(12, range(12)) == schedule(12, range(12))
    arms = {tuple(run.arm for run in schedule(12, range(n, n + 12))) for n in range(20)}
    assert len(arms) > 5
    assert len(schedule(2, [-1, 2**80])) == 4


def ratio_in_order(num_pairs: int, log_value_at: Sequence[float], seed: int = 0) -> Comparison:
    """B takes 5 % longer, and the n-th run exp(log_value_at[n]) longer than the first."""
    values = {"A": [0.0] * num_pairs, "B": [0.0] * num_pairs}
    order = schedule(num_pairs, range(seed, seed + num_pairs))
    for run, log_value in zip(order, log_value_at, strict=True):
        values[run.arm][run.pair] = math.exp(log_value) * (1.05 if run.arm == "B" else 1.0)
    return compare_pairs(measure(values["A"], values["B"]))


@pytest.mark.parametrize("num_pairs", [2, 6, 12])
@pytest.mark.parametrize("step", [0.01, -0.03])
def test_steady_drift_cancels(num_pairs, step):
    """A-B-A-B would show exp(step) too much."""
    drift = [step * position for position in range(2 * num_pairs)]
    assert ratio_in_order(num_pairs, drift).ratio == pytest.approx(1.05, rel=1e-9)


def test_what_recurs_every_fourth_run_is_no_difference():
    """A-B-B-A alone would put every crest of this wave on one arm."""
    for phase in range(4):
        wave = [0.05 * math.cos(math.pi / 2 * (run + phase)) for run in range(24)]
        result = ratio_in_order(12, wave, seed=phase)
        assert result.ratio == pytest.approx(1.05, rel=1e-9)


@pytest.mark.parametrize("num_pairs", [-2, 0, 1, 7])
def test_schedule_refuses_odd_numbers(num_pairs):
    with pytest.raises(LoadError, match=f"{num_pairs} pairs of runs") as caught:
        schedule(num_pairs, range(20))
    suggested = int(caught.value.remedy.split()[-1])
    assert len(schedule(suggested, range(20))) == 2 * suggested


@pytest.mark.parametrize("seeds", [[], [1, 2, 3], [1, 2, 3, 1]])
def test_schedule_refuses_too_few_seeds(seeds):
    with pytest.raises(LoadError, match=f"{len(set(seeds))} different seeds"):
        schedule(4, seeds)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 4, 5])
def test_no_verdict_below_six_pairs(num_pairs):
    result = compare_ratios([1.5 + 0.01 * i for i in range(num_pairs)])
    assert result.interval is None
    assert not result.differs
    assert result.verdict == f"no verdict: {num_pairs} pairs of runs, 6 needed"
    assert result.ratio == pytest.approx(1.5 + 0.01 * (num_pairs - 1) / 2, rel=1e-3)


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 6), (0.0125, 8), (2 / 64, 6), (0.01, 8)])
def test_fewest_pairs(alpha, needed):
    assert signed_rank.fewest_pairs(alpha) == needed
    rng = np.random.default_rng(0)
    assert signed_rank.interval(rng.standard_normal(needed), alpha) is not None
    assert signed_rank.interval(rng.standard_normal(needed - 1), alpha) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "B has no value in pair 3"),
        (math.nan, "B has no value in pair 3"),
        (math.inf, "B has no value in pair 3"),
        (0.0, "B is 0 in pair 3"),
        (-1.5, "B is -1.5 in pair 3"),
    ],
)
def test_not_comparable(value, said):
    b: list[float | None] = [1.0] * 12
    b[2] = value
    result = compare_pairs(measure([1.0] * 12, b))
    assert result.verdict == f"not comparable: {said}"
    assert result.ratio is result.interval is result.p_value is None
    assert "A " in compare_pairs(measure(b, [1.0] * 12)).verdict


def test_no_runs_and_unpaired_runs():
    assert compare_pairs(measure([], [])).verdict == "not comparable: no pair of runs"
    with pytest.raises(ValueError, match="2 runs of A, 1 of B"):
        compare_pairs(measure([1.0, 1.0], [1.0]))


# --- several measures ----------------------------------------------------------------------------


def five_measures(ratio: float, num_pairs: int, seed: int = 0) -> list[Measure]:
    rng = np.random.default_rng(seed)
    return [
        measure(
            np.exp(noisy(rng, num_pairs)).tolist(),
            (ratio * np.exp(noisy(rng, num_pairs))).tolist(),
            name,
        )
        for name in ("throughput", "goodput", "TTFT", "TPOT", "ITL p99")
    ]


def test_primary_measure_is_first_and_has_alpha_to_itself():
    results = compare(five_measures(1.1, 12), primary="TTFT")
    assert [result.name for result in results] == [
        "TTFT", "throughput", "goodput", "TPOT", "ITL p99",
    ]  # fmt: skip
    assert [result.primary for result in results] == [True, False, False, False, False]
    assert [result.alpha for result in results] == [0.05, 0.0125, 0.0125, 0.0125, 0.0125]


def test_secondary_measures_need_more_pairs():
    results = compare(five_measures(1.5, 6), primary="TTFT")
    assert results[0].differs
    assert {result.verdict for result in results[1:]} == {"no verdict: 6 pairs of runs, 8 needed"}


def test_secondary_measures_together_keep_the_level():
    """Four independent ones at 5 % each would raise a false alarm in 18 % of comparisons."""
    alarms = sum(
        any(result.differs for result in compare(five_measures(1.0, 12, seed), "TTFT")[1:])
        for seed in range(250)
    )
    assert 0.01 <= alarms / 250 <= 0.09


def test_unknown_primary_measure():
    with pytest.raises(LoadError, match="'latency'") as caught:
        compare(five_measures(1.0, 6), primary="latency")
    assert "throughput, goodput, TTFT" in caught.value.remedy


# --- the report ----------------------------------------------------------------------------------


def row(**changes: object) -> dict[str, str]:
    known = {
        "name": "TTFT", "unit": "s", "num_pairs": 12, "primary": True, "alpha": 0.05,
        "median_a": 0.18312, "median_b": 0.1923, "ratio": 1.0493, "interval": (1.041, 1.0583),
    }  # fmt: skip
    comparison = Comparison(**{**known, **changes})  # type: ignore[arg-type]
    return dict(zip(HEADER, comparison_rows([comparison])[0], strict=True))


def test_a_row():
    assert row() == {
        "measure": "TTFT (primary)", "A": "183 ms", "B": "192 ms", "B / A": "1.049",
        "interval": "1.041 to 1.058 (95%)", "verdict": "B is 4.9% higher",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "a", "b", "shown"),
    [
        ("s", 0.99, 1.2345, ("0.990 s", "1.23 s")),
        ("s", 0.0201, 0.00095, ("20.1 ms", "0.950 ms")),
        ("s", 0.000042, 0.000041, ("42.0 µs", "41.0 µs")),
        ("s", 3e-8, 2e-8, ("0.0300 µs", "0.0200 µs")),
        ("tokens/s", 12345.6, 99.95, ("12,346 tokens/s", "100.0 tokens/s")),
        ("", 0.93456, 0.5, ("0.935", "0.500")),
    ],
)
def test_values_for_people(unit, a, b, shown):
    cells = row(unit=unit, median_a=a, median_b=b)
    assert (cells["A"], cells["B"]) == shown


@pytest.mark.parametrize(
    ("ratio", "interval", "shown", "verdict"),
    [
        (0.5, (0.4, 0.6), "0.400 to 0.600", "B is 50% lower"),
        (3.1, (2.0, 4.0), "2.000 to 4.000", "B is 210% higher"),
        (1.0003, (1.0001, 1.0004), "1.0001 to 1.0004", "B is 0.030% higher"),
        (1.01, (0.9996, 1.02), "0.9996 to 1.0200", "no difference shown"),
        (1.01, (1.0, 1.02), "1.000 to 1.020", "no difference shown"),
    ],
)
def test_ratios_for_people(ratio, interval, shown, verdict):
    cells = row(ratio=ratio, interval=interval)
    assert cells["interval"] == f"{shown} (95%)"
    assert cells["verdict"] == verdict


def test_table_of_what_could_and_could_not_be_compared():
    measures = five_measures(1.5, 8)
    measures[1] = Measure(name="goodput", unit="requests/s", a=[1.0] * 8, b=[0.0] * 8)
    lines = comparison_table(compare(measures, primary="TTFT")).splitlines()
    assert [line.split("  ")[0] for line in lines[:6]] == [
        "measure", "TTFT (primary)", "throughput", "goodput", "TPOT", "ITL p99",
    ]  # fmt: skip
    assert lines[3].split() == [
        "goodput", "-", "-", "-", "-", "not", "comparable:", "B", "is", "0", "in", "pair", "1",
    ]  # fmt: skip
    assert "(98.75%)" in lines[2]
    column = lines[0].index("verdict")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[:6])
    assert lines[7].startswith("A, B: medians of 8 runs")
    assert "primary" in lines[8]
