"""Plays a plan against a target: when each request is sent, and what is kept of it.

The open loop sends when the plan says, whatever the server does, and latencies count from then
(Tene, "How NOT to measure latency", on coordinated omission). The closed loop keeps a number of
sessions going, and says nothing of latency under a given load.

Within a conversation a turn is meant to be sent `think_s` after the end of the answer before it.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from loadgen.target import Message, Outgoing, Target
from loadgen.types import Plan, Prompt, Record, Session, Turn

_RECENT = 100  # latencies that are shown while it runs


@dataclass(slots=True)
class Progress:
    """Where a run is; read by whoever shows it."""

    num_sessions: int
    num_begun: int = 0
    records: list[Record] = field(default_factory=list)  # in the order they were sent
    num_in_flight: int = 0
    zero_s: float = 0.0  # of the monotonic clock
    duration_s: float = 0.0
    interrupted: bool = False
    # Counted as requests end, so that to show them costs the same however many there were.
    errors: Counter[str] = field(default_factory=Counter)
    recent_ttfts_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def end(self, record: Record) -> None:
        """Count a request that is over."""
        self.num_in_flight -= 1
        if record.error:
            self.errors[record.error] += 1
        if record.received_at_s:
            self.recent_ttfts_s.append(record.ttft_s)

    @property
    def lags_s(self) -> tuple[float, ...]:
        """How late each request was sent."""
        return tuple(record.sent_at_s - record.intended_at_s for record in self.records)


async def play(
    plan: Plan, target: Target, stop: asyncio.Event, progress: Progress, concurrency: int | None
) -> None:
    """Play the whole plan, or until `stop` is set; `progress` holds what came of it.

    `concurrency` sessions at a time, or, without it, each when the plan says.
    """
    with _quiet_collector():
        progress.zero_s = _now()
        if concurrency is None:
            running = asyncio.create_task(_open_loop(plan, target, progress))
        else:
            running = asyncio.create_task(_closed_loop(plan, target, concurrency, progress))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        progress.interrupted = not running.done()
        running.cancel()
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await running
        progress.duration_s = max((record.end_at_s for record in progress.records), default=0.0)


async def _open_loop(plan: Plan, target: Target, progress: Progress) -> None:
    async with asyncio.TaskGroup() as sessions:
        for number, session in enumerate(plan):
            await _until(progress.zero_s + session.start_at_s)
            playing = _play_session(number, session, session.start_at_s, target, progress)
            sessions.create_task(playing)


async def _closed_loop(plan: Plan, target: Target, concurrency: int, progress: Progress) -> None:
    numbered = iter(enumerate(plan))

    async def worker() -> None:
        for number, session in numbered:
            now_s = _now() - progress.zero_s
            await _play_session(number, session, now_s, target, progress)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(concurrency, len(plan))):
            workers.create_task(worker())


async def _play_session(
    number: int, session: Session, start_at_s: float, target: Target, progress: Progress
) -> None:
    """Send one turn after the other; a turn that failed ends the session."""
    progress.num_begun += 1
    said: list[Message] = []
    intended_at_s = start_at_s
    for index, turn in enumerate(session.turns):
        if index:
            intended_at_s += turn.think_s
            await _until(progress.zero_s + intended_at_s)
        record = Record(
            session=number, turn=index, tenant=session.tenant, intended_at_s=intended_at_s
        )
        progress.records.append(record)
        progress.num_in_flight += 1
        try:
            await target.send(_outgoing(session, turn, said), record, progress.zero_s)
        finally:
            progress.end(record)
        if not record.ok:
            return
        if len(session.turns) > 1:
            said += [Message("user", str(turn.prompt)), Message("assistant", record.text)]
        intended_at_s = record.end_at_s


def _outgoing(session: Session, turn: Turn, said: list[Message]) -> Outgoing:
    prompt: Prompt | tuple[Message, ...] = turn.prompt
    if len(session.turns) > 1:
        assert isinstance(turn.prompt, str), "see `loadgen.target.check`"
        prompt = (*said, Message("user", turn.prompt))
    return Outgoing(
        prompt=prompt,
        max_tokens=turn.max_tokens,
        tenant=session.tenant,
        priority=session.priority,
    )


def _now() -> float:
    """Return the loop's time: the monotonic clock, but for tests."""
    return asyncio.get_running_loop().time()


async def _until(at_s: float) -> None:
    """Sleep until this time of the monotonic clock; always lets others go first."""
    await asyncio.sleep(max(0.0, at_s - _now()))


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep Python's collector from pausing the loop: what exists now is looked at no more."""
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
