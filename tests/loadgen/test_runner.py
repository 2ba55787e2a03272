"""Loops and latencies in virtual time: when requests go out, and from when their clocks run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from loadgen.mock import Clock, MockConfig
from loadgen.progress import describe
from loadgen.runner import Progress, play
from loadgen.target import Message, check
from loadgen.types import LoadError, Session, Turn
from tests.loadgen.virtual import run_virtually


class FrozenTarget:
    """A mock server without a network: each token when it is due."""

    def __init__(self, config: MockConfig, *, fails: tuple[int, ...] = ()) -> None:
        self.config = config
        self.fails = fails
        self.sent: list[object] = []
        self.clock: Clock | None = None

    async def send(self, outgoing, record, zero_s):
        loop = asyncio.get_running_loop()
        self.clock = self.clock or Clock(self.config, loop.time)
        record.sent_at_s = loop.time() - zero_s
        start_s = self.clock.now()
        self.sent.append(outgoing.prompt)
        if record.session in self.fails:
            record.error = "http_500"
        else:
            for index in range(outgoing.max_tokens):
                await self.clock.until(start_s + self.config.due_s(index))
                record.received_at_s.append(loop.time() - zero_s)
            record.text = f"answer {len(self.sent)}"
            record.num_output_tokens = outgoing.max_tokens
        record.end_at_s = loop.time() - zero_s


def played(plan, target, *, concurrency=None, stop_at_s=None):
    async def main():
        stop, progress = asyncio.Event(), Progress(len(plan))
        if stop_at_s is not None:
            asyncio.get_running_loop().call_later(stop_at_s, stop.set)
        await play(plan, target, stop, progress, concurrency)
        return progress

    return run_virtually(main())


def singles(times, max_tokens=1):
    turn = Turn(prompt="hello", max_tokens=max_tokens)
    return tuple(Session(start_at_s=float(at_s), turns=(turn,)) for at_s in times)


def test_a_frozen_server_shows_in_the_open_loop_as_theory_says():
    """A server that stands still for 2 s: whoever was meant to arrive meanwhile waits for its end.

    A loop that waits for answers would send one request in those two seconds and see one long
    latency; here a tenth of the requests do.
    """
    ttft_s, at_s, freeze_s = 0.05, 6.995, 2.0
    times = np.arange(0, 20, 0.01)
    config = MockConfig(ttft_ms=1000 * ttft_s, freeze_at_s=at_s, freeze_s=freeze_s)
    progress = played(singles(times), FrozenTarget(config))
    measured = np.array([record.ttft_s for record in progress.records])

    waits_s = np.where(times < at_s, freeze_s, at_s + freeze_s - times)
    is_hit = (times + ttft_s >= at_s) & (times < at_s + freeze_s)
    theory = ttft_s + np.where(is_hit, waits_s, 0.0)
    np.testing.assert_allclose(measured, theory, atol=1e-6)
    assert max(progress.lags_s) < 1e-6
    # 200 requests were meant to arrive in the freeze and 5 more were waiting: 10.25 % of 2,000,
    # whose latencies fall evenly from 2.05 s.
    assert np.percentile(measured, 89.7) == pytest.approx(ttft_s, abs=1e-6)
    assert np.percentile(measured, 99) == pytest.approx(freeze_s + ttft_s - 0.15, abs=0.011)


def test_a_loop_that_is_late_counts_from_when_the_plan_meant():
    async def main():
        loop, progress = asyncio.get_running_loop(), Progress(7)
        loop.call_later(2.5, loop.block, 3.0)
        target = FrozenTarget(MockConfig(ttft_ms=50))
        await play(singles(range(7)), target, asyncio.Event(), progress, None)
        return progress

    progress = run_virtually(main())
    assert [record.intended_at_s for record in progress.records] == [0, 1, 2, 3, 4, 5, 6]
    assert progress.lags_s == pytest.approx([0, 0, 0, 2.5, 1.5, 0.5, 0], abs=1e-6)
    ttfts_s = [record.ttft_s for record in progress.records]
    assert ttfts_s == pytest.approx([0.05, 0.05, 0.05, 2.55, 1.55, 0.55, 0.05], abs=1e-6)


def test_the_live_line_counts_as_requests_end_and_reads_no_record():
    async def main():
        stop, progress = asyncio.Event(), Progress(300)
        target = FrozenTarget(MockConfig(ttft_ms=500), fails=(3, 7))
        await play(singles(np.arange(300)), target, stop, progress, None)
        progress.records = None
        return progress, describe(progress)

    progress, line = run_virtually(main())
    assert line.endswith("300 of 300 begun, 0 in flight, recent TTFT 500 ms, 2 http_500")
    assert len(progress.recent_ttfts_s) == 100


def test_the_closed_loop_holds_its_concurrency_and_hides_the_freeze():
    config = MockConfig(ttft_ms=50, freeze_at_s=7.0, freeze_s=2.0)
    progress = played(singles([0.0] * 400), FrozenTarget(config), concurrency=2)
    slow = [record for record in progress.records if record.ttft_s > 1]
    assert len(slow) == 2
    assert progress.duration_s == pytest.approx(400 / 2 * 0.05 + 2.0, abs=1e-6)
    sent = sorted(record.sent_at_s for record in progress.records)
    assert all(after >= before + 0.0499 for before, after in zip(sent, sent[2:], strict=False))


def test_a_turn_carries_the_real_answers_before_it_and_comes_after_a_thought():
    turns = tuple(Turn(prompt=f"question {n}", max_tokens=2, think_s=3.0) for n in range(3))
    target = FrozenTarget(MockConfig(ttft_ms=1000, itl_ms=500))
    progress = played((Session(start_at_s=2.0, turns=turns),), target)
    assert target.sent[0] == (Message("user", "question 0"),)
    assert target.sent[2] == (
        Message("user", "question 0"),
        Message("assistant", "answer 1"),
        Message("user", "question 1"),
        Message("assistant", "answer 2"),
        Message("user", "question 2"),
    )
    assert [record.intended_at_s for record in progress.records] == pytest.approx([2.0, 6.5, 11.0])
    assert [record.e2e_s for record in progress.records] == pytest.approx([1.5] * 3)


def test_a_failed_turn_ends_its_conversation_and_no_other():
    turns = (Turn(prompt="a", max_tokens=1), Turn(prompt="b", max_tokens=1))
    plan = tuple(Session(start_at_s=0.0, turns=turns) for _ in range(3))
    progress = played(plan, FrozenTarget(MockConfig(), fails=(1,)))
    ends = [(record.session, record.turn, record.error) for record in progress.records]
    assert sorted(ends) == [(0, 0, ""), (0, 1, ""), (1, 0, "http_500"), (2, 0, ""), (2, 1, "")]


def test_an_interrupted_run_keeps_what_came_until_then():
    target = FrozenTarget(MockConfig(ttft_ms=500))
    progress = played(singles(np.arange(0, 10, 1.0)), target, stop_at_s=3.2)
    assert progress.interrupted
    assert progress.num_begun == 4
    assert [len(record.received_at_s) for record in progress.records] == [1, 1, 1, 0]


def test_plans_that_an_endpoint_cannot_be_sent_are_refused():
    ids, text = Turn(prompt=(1, 2), max_tokens=1), Turn(prompt="b", max_tokens=1)
    with pytest.raises(LoadError, match="plan is empty"):
        check((), "completions")
    check((Session(start_at_s=0.0, turns=(ids,)),), "completions")
    with pytest.raises(LoadError, match="chat cannot be sent as token ids"):
        check((Session(start_at_s=0.0, turns=(ids,)),), "chat")
    with pytest.raises(LoadError, match="conversation cannot be made of token ids"):
        check((Session(start_at_s=0.0, turns=(text, ids)),), "completions")
