"""Steps measured and costs fitted, on an executor with known costs and a clock of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import BLOCK_SIZE, EngineConfig
from engine.fake import ChecksumExecutor
from engine.profile import Case, Measured, Profile, What
from engine.startup import CannotStart, StartupTimes
from engine.step_times import (
    FITTED,
    HELD_OUT,
    Cell,
    Stand,
    estimate,
    fit,
    measure,
    measure_within,
    profile_of,
)
from engine.work import Shares
from scheduler.costs import StepCosts, StepShape
from scheduler.types import KVGeometry
from serving.progress import NoProgress
from tests.tiny_llama import write_model

SIZES = [case.chunk for case in FITTED if not (case.num_decodes or case.behind)]
KNOWN = StepCosts(
    dense=tuple((size, 0.010 + 0.001 * max(size, 12)) for size in SIZES),
    request_s=0.0002,
    context_token_s=1e-6,
    visit_s=3e-7,
)
WHAT = What(model="m", dtype="bfloat16", kernels="native, avx2", num_threads=2)


class Clock:
    """Moves on only as the executor waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_stand(costs: StepCosts, clock: Clock, num_rows: int = 33, num_row_tokens: int = 2176):
    num_blocks = num_rows * -(-num_row_tokens // BLOCK_SIZE)
    executor = ChecksumExecutor(
        KVGeometry(block_size=BLOCK_SIZE, num_blocks=num_blocks, block_bytes=8),
        max_num_rows=num_rows, max_model_len=num_row_tokens, vocab_size=97,
        cost=costs, clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    return Stand(executor, num_rows=num_rows, num_row_tokens=num_row_tokens, num_blocks=num_blocks)


def test_a_case_is_the_step_that_is_measured():
    """The executor's own count of a step, and the case's."""
    clock = Clock()
    seen = []

    class Spy(StepCosts):
        def step_s(self, shape: StepShape) -> float:
            seen.append(shape)
            return 1.0

    stand = make_stand(Spy(), clock)
    for case in (*FITTED, *HELD_OUT):
        assert stand.can(case)
        stand.seconds(case)
        expected = case.shape
        if case.num_decodes:  # those have computed a token before
            grown = replace(case, context=case.context + 1)
            expected = grown.shape
        assert seen[-1] == expected, case


def test_costs_that_are_known_are_found():
    cells = measure(make_stand(KNOWN, Clock()), (*FITTED, *HELD_OUT), 1, lambda _: None)
    assert [cell.case for cell in cells] == [*FITTED, *HELD_OUT]
    profile = profile_of(WHAT, cells)
    assert [cell.is_fitted for cell in profile.cells].count(True) == len(FITTED)
    assert max(abs(cell.error) for cell in profile.cells) < 0.02


def test_what_there_is_no_room_for_is_left_out():
    stand = make_stand(KNOWN, Clock(), num_rows=3, num_row_tokens=64)
    cells = measure(stand, FITTED, 1, lambda _: None)
    assert [cell.case for cell in cells] == [
        *(Case(chunk=size) for size in (1, 2, 4, 8, 16, 32)),
        Case(num_decodes=2, context=16),
    ]


def test_costs_are_never_negative_however_noisy():
    cells = [
        Cell(case=Case(chunk=1), median_s=2.0),
        Cell(case=Case(chunk=8), median_s=1.0),
        Cell(case=Case(num_decodes=4, context=16), median_s=0.5),
        Cell(case=Case(num_decodes=4, context=64), median_s=0.1),
        Cell(case=Case(chunk=8, behind=64), median_s=0.1),
    ]
    assert fit(cells).step_s(StepShape(1, 1, 1, 1)) > 0.0


@pytest.mark.parametrize(
    ("limit_s", "sizes"),
    [(0.0, [1, 8]), (0.3, [1, 8, 64]), (0.4, [1, 8, 64, 128]), (9.0, [1, 8, 64, 128, 256])],
)
def test_a_start_measures_larger_steps_while_time_allows(limit_s: float, sizes: list[int]):
    clock = Clock()
    stand = make_stand(KNOWN, clock, num_rows=1, num_row_tokens=288)
    cells = measure_within(stand, limit_s, clock)
    assert [cell.case.chunk for cell in cells] == sizes
    longest_s = 2 * KNOWN.step_s(StepShape(8, 1, 8, 36))
    assert clock.now <= max(limit_s, longest_s)


def test_what_attention_costs_is_told_from_its_share_of_the_work():
    cells = [Cell(case=Case(chunk=size), median_s=1.0 + size) for size in (1, 8, 64)]
    found = estimate(cells, Shares(request=0.25, visit=0.5, context_token=0.125))
    assert [size for size, _ in found.dense] == [1, 8, 64]
    assert [each_s for _, each_s in found.dense] == pytest.approx([2.0, 9.0, 65.0], rel=0.01)
    rates = (found.request_s, found.visit_s, found.context_token_s)
    assert rates == pytest.approx((0.25, 0.5, 0.25), rel=0.01)


def test_a_profile_comes_back_from_its_file(tmp_path: Path):
    cells = (Measured(case=Case(chunk=8), median_s=0.1, error=-0.5, is_fitted=True),)
    profile = Profile(what=WHAT, costs=KNOWN, cells=cells)
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="what"):
        Profile.read(tmp_path / "other.json")


def test_a_profile_of_something_else_is_refused(tmp_path: Path):
    assert WHAT.difference(WHAT) is None
    assert WHAT.difference(replace(WHAT, num_threads=3)) == "threads 2, not 3"
    profile = Profile(what=replace(WHAT, model="another"), costs=KNOWN)
    config = EngineConfig(
        model_name="m", model_folder=write_model(tmp_path / "tiny"), kv_memory_bytes=1 << 22,
        profile=profile,
    )  # fmt: skip
    with pytest.raises(CannotStart, match="measured with model another, not tiny"):
        build_engine(config, StartupTimes(NoProgress()), lambda _: None)
