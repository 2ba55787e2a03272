"""The loop: commands in, one report a step out, on a clock that the test holds."""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.fake import ChecksumExecutor
from engine.messages import Abort, Failed, StepEvents, Stop, Submit
from scheduler.costs import StepCosts
from scheduler.types import FinishReason, RejectReason, RequestId
from tests.factories import VOCAB_SIZE, make_executor, make_geometry, make_scheduler, make_spec
from tests.properties.law import solo


class ManualClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_core(executor=None, **settings):
    reports = []
    core = EngineCore(make_scheduler(**settings), executor or make_executor(), reports.append)
    return core, reports


def serve(core, reports):
    """Turn until every request that was submitted has ended; return the tokens of each."""
    tokens, ended = {}, {}
    while core._scheduler.has_work or not core.inbox.empty():
        core.turn()
    for report in reports:
        for event in report.tokens:
            tokens.setdefault(event.request_id, []).append(event.token_id)
        for event in report.finished:
            ended[event.request_id] = event.reason
    return tokens, ended


def test_requests_are_served_with_the_tokens_of_running_alone():
    core, reports = make_core()
    specs = [make_spec(f"r{i}", range(1, 3 + 7 * i), max_tokens=5) for i in range(4)]
    for spec in specs:
        core.inbox.put(Submit(spec))
    tokens, ended = serve(core, reports)
    assert tokens == {spec.request_id: solo(spec)[0] for spec in specs}
    assert set(ended.values()) == {FinishReason.LENGTH}
    assert reports[-1].view.num_running == 0


@pytest.mark.parametrize("most", [1, 5, 6, 1000])
def test_very_many_scores_make_several_reports_in_order(monkeypatch, most):
    monkeypatch.setattr("engine.core.MAX_SCORED_POSITIONS", most)
    core, reports = make_core()
    specs = [make_spec(name, range(1, 9), max_tokens=2, prompt_logprobs=2) for name in "ab"]
    for spec in specs:
        core.inbox.put(Submit(spec))
    tokens, _ = serve(core, reports)
    assert tokens == {spec.request_id: solo(spec)[0] for spec in specs}
    for spec in specs:
        parts = [
            event
            for report in reports
            for event in report.prompt_logprobs
            if event.request_id == spec.request_id
        ]
        starts = [event.start for event in parts]
        assert starts == [1 + sum(len(e.positions) for e in parts[:i]) for i in range(len(parts))]
        assert sum(len(event.positions) for event in parts) == 7
    for report in reports:
        assert sum(len(event.positions) for event in report.prompt_logprobs) <= most
    assert sum(len(report.started) for report in reports) == 2
    assert reports[0].started
    steps = [report.view.num_steps for report in reports if report.step_s]
    assert steps == sorted(set(steps)), "a step is complete once"


def test_a_step_makes_one_report():
    core, reports = make_core()
    for name in ("a", "b", "c"):
        core.inbox.put(Submit(make_spec(name, max_tokens=4)))
    serve(core, reports)
    assert len(reports) == 4
    assert [len(report.tokens) for report in reports] == [3, 3, 3, 3]


class SlowPlans:
    """A scheduler for which every plan takes a second of the clock's time."""

    def __init__(self, clock, scheduler):
        self._clock, self._scheduler = clock, scheduler

    def __getattr__(self, name):
        return getattr(self._scheduler, name)

    def plan_step(self, now):
        self._clock.sleep(1.0)
        return self._scheduler.plan_step(now)


@pytest.mark.parametrize(("depth", "expected"), [(1, [[1.0], [1.0]]), (2, [[1.0, 1.0], [], []])])
def test_the_time_of_each_plan_is_reported(depth, expected):
    clock, reports = ManualClock(), []
    scheduler = SlowPlans(clock, make_scheduler())
    core = EngineCore(scheduler, make_executor(), reports.append, depth=depth, clock=clock)
    core.inbox.put(Submit(make_spec("a", max_tokens=2)))
    while core._scheduler.has_work or not core.inbox.empty():
        core.turn()
    assert [report.plans_s for report in reports] == expected[: len(reports)]


def test_refusals_and_aborts_are_reported():
    core, reports = make_core(max_num_running=1, max_num_waiting=0)
    core.inbox.put(Submit(make_spec("a")))
    core.inbox.put(Submit(make_spec("b")))
    core.inbox.put(Abort(RequestId("a")))
    core.inbox.put(Abort(RequestId("nobody")))
    core.turn()
    (report,) = reports
    assert [event.reason for event in report.rejected] == [RejectReason.QUEUE_FULL]
    assert [event.reason for event in report.finished] == [FinishReason.ABORT]


def test_step_times_come_from_the_cost_model():
    clock = ManualClock()
    cost = StepCosts.linear(fixed_s=0.25, token_s=0.125)
    executor = ChecksumExecutor(
        make_geometry(), max_num_rows=8, max_model_len=256, vocab_size=VOCAB_SIZE, cost=cost,
        clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    reports = []
    core = EngineCore(make_scheduler(), executor, reports.append, clock=clock)
    core.inbox.put(Submit(make_spec("a", (1, 2, 3), max_tokens=3)))
    serve(core, reports)
    assert [report.step_s for report in reports] == [0.25 + 3 * 0.125, 0.375, 0.375]
    assert clock.now == 100.0 + 0.625 + 2 * 0.375


def test_stop_ends_the_loop():
    core, reports = make_core()
    core.inbox.put(Stop())
    core.run()
    assert not [report for report in reports if isinstance(report, Failed)]


def test_a_failing_executor_is_reported_before_the_loop_ends():
    class Broken:
        def submit(self, plan):
            raise MemoryError("no room")

        def close(self):
            self.closed = True

    executor = Broken()
    core, reports = make_core(executor)
    core.inbox.put(Submit(make_spec("a")))
    with pytest.raises(MemoryError):
        core.run()
    (failed,) = reports
    assert failed.cause.startswith("MemoryError (")
    assert "no room" not in failed.cause
    assert "no room" in failed.trace
    assert "in submit" in failed.trace
    assert executor.closed


def test_queue_time_is_measured_on_the_schedulers_clock():
    clock = ManualClock()
    reports = []
    core = EngineCore(
        make_scheduler(max_num_running=1), make_executor(max_num_rows=1), reports.append,
        clock=clock,
    )  # fmt: skip
    core.inbox.put(Submit(make_spec("a", max_tokens=2)))
    core.inbox.put(Submit(make_spec("b", max_tokens=1)))
    while not any(event.request_id == "b" for r in reports for event in r.finished):
        core.turn()
        clock.sleep(1.0)
    (b,) = [event for r in reports for event in r.started if event.request_id == "b"]
    assert b.queue_s == 2.0
    assert isinstance(reports[0], StepEvents)
