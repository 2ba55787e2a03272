"""The costs of a step: what they say between, before and behind what was measured."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.costs import StepCosts, StepShape, num_visits

COSTS = StepCosts(dense=((1, 1.0), (4, 2.5), (8, 8.5)), request_s=16.0, visit_s=0.25)
counts = st.integers(0, 5000)
seconds = st.floats(0, 10)


@st.composite
def step_costs(draw: st.DrawFn) -> StepCosts:
    sizes = sorted(draw(st.sets(st.integers(0, 600), min_size=1, max_size=6)))
    dense = sorted(draw(st.lists(seconds, min_size=len(sizes), max_size=len(sizes))))
    rates = {name: draw(seconds) for name in ("request_s", "context_token_s", "visit_s")}
    return StepCosts(dense=tuple(zip(sizes, dense, strict=True)), **rates)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 1.0), (1, 1.0), (2, 1.5), (4, 2.5), (6, 5.5), (8, 8.5), (10, 11.5)],
)
def test_dense_layers_go_by_lines_between_what_was_measured(num_tokens: int, expected: float):
    assert COSTS.step_s(StepShape(num_tokens)) == expected


def test_all_that_is_in_a_step_counts():
    shape = StepShape().with_request(10).with_tokens(10, 3).with_request(0).with_tokens(0, 1)
    assert shape == StepShape(4, 2, 14, 11 + 12 + 13 + 1)
    assert COSTS.step_s(shape) == 2.5 + 2 * 16.0 + 37 * 0.25


@given(counts, counts, counts)
def test_visits_add_up_however_a_chunk_is_cut(num_computed: int, one: int, other: int):
    whole = num_visits(num_computed, one + other)
    assert whole == num_visits(num_computed, one) + num_visits(num_computed + one, other)


@given(step_costs(), st.tuples(counts, counts, counts, counts), st.integers(0, 3), counts)
def test_more_never_costs_less(costs: StepCosts, shape: tuple, which: int, more: int):
    larger = list(shape)
    larger[which] += more
    few_s, many_s = costs.step_s(StepShape(*shape)), costs.step_s(StepShape(*larger))
    assert many_s >= few_s - 1e-9 * few_s


@given(step_costs())
def test_costs_come_back_from_json_as_they_were(costs: StepCosts):
    assert msgspec.json.decode(msgspec.json.encode(costs), type=StepCosts) == costs


@pytest.mark.parametrize(
    "wrong",
    [
        {"dense": ()},
        {"dense": ((2, 1.0), (1, 2.0))},
        {"dense": ((1, 2.0), (2, 1.0))},
        {"dense": ((1, -1.0),)},
        {"dense": ((1, float("inf")),)},
        {"request_s": -1.0},
        {"visit_s": float("nan")},
    ],
)
def test_costs_that_are_none_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="the costs of a step"):
        StepCosts(**wrong)
