"""The loop of one instance: takes commands, plans, executes, reports. It decides nothing.

Torch-free: what to compute is the scheduler's, how is the executor's. It runs on a thread of its
own and is the only one to touch both.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from engine.executor import Executor
from engine.faults import cause_of, detail_of
from engine.messages import (
    Abort,
    Command,
    Failed,
    Inspect,
    Inspected,
    Ping,
    Pong,
    Report,
    StepEvents,
    Stop,
    Submit,
)
from scheduler.instance.plan import StepPlan, StepResult
from scheduler.load import InstanceView
from scheduler.request import InvariantError
from scheduler.types import (
    FinishedEvent,
    PromptLogprobs,
    RejectedEvent,
    RequestEvent,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)

# In one report. Each takes some 300 bytes with 20 likeliest tokens, and whoever reads a report does
# nothing else meanwhile; steps of ordinary size have fewer.
MAX_SCORED_POSITIONS = 4096


class StepScheduler(Protocol):
    """What the loop asks of a scheduler: `InstanceScheduler`, or one that writes it down."""

    def add(
        self, spec: RequestSpec, now: float, output_token_ids: Sequence[int] = ()
    ) -> RejectedEvent | None: ...
    def abort(
        self, request_id: RequestId, num_output_tokens: int | None = None
    ) -> FinishedEvent | None: ...
    def plan_step(self, now: float) -> StepPlan | None: ...
    def complete_step(self, result: StepResult) -> list[RequestEvent]: ...
    def check_idle(self) -> None: ...
    def view(self) -> InstanceView: ...
    def state(self) -> dict[str, Any]: ...

    @property
    def has_work(self) -> bool: ...


class EngineCore:
    """Holds at most `depth` steps in flight: at 1 a step is planned when the last is complete,
    at 2 while it runs.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        executor: Executor,
        emit: Callable[[Report], None],
        *,
        depth: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inbox: SimpleQueue[Command] = SimpleQueue()  # any thread may put
        self._scheduler = scheduler
        self._executor = executor
        self._emit = emit
        self._depth = depth
        self._clock = clock
        self._in_flight: deque[StepPlan] = deque()
        self._view = scheduler.view()  # as reported last
        self._stopping = False

    def run(self) -> None:
        """Serve until told to stop. A failure is reported as `Failed` and then raised."""
        try:
            while not self._stopping:
                self.turn()
        except Exception as error:
            self._emit(Failed(cause_of(error), detail_of(error)))
            raise
        finally:
            self._executor.close()

    def turn(self) -> None:
        """Take what has arrived, keep the executor busy, report what the oldest step brought.

        Waits only when there is nothing to do: for a command when idle, else for a step.
        """
        idle = not self._in_flight and not self._scheduler.has_work
        if idle:
            self._scheduler.check_idle()
        events = self._take_commands(wait=idle)
        result: StepResult | None = None
        plans_s: list[float] = []
        while len(self._in_flight) < self._depth:
            began_s = self._clock()
            plan = self._scheduler.plan_step(began_s)
            if plan is None:
                break
            plans_s.append(self._clock() - began_s)
            self._executor.submit(plan)
            self._in_flight.append(plan)
        if self._in_flight:
            result = self._executor.poll()
            self._in_flight.popleft()
            events += self._scheduler.complete_step(result)
        elif self._scheduler.has_work:
            raise InvariantError("requests are alive, but no step can be planned")
        if events or result is not None:
            self._report(events, result.duration_s if result else 0.0, plans_s)

    def _take_commands(self, *, wait: bool) -> list[RequestEvent]:
        events: list[RequestEvent] = []
        try:
            command = self.inbox.get(block=wait)
            while True:
                self._obey(command, events)
                command = self.inbox.get_nowait()
        except Empty:
            return events

    def _obey(self, command: Command, events: list[RequestEvent]) -> None:
        event: RequestEvent | None = None
        match command:
            case Submit(spec, output_token_ids):
                event = self._scheduler.add(spec, self._clock(), output_token_ids)
            case Abort(request_id, num_output_tokens):
                event = self._scheduler.abort(request_id, num_output_tokens)
            case Inspect(number):
                self._emit(Inspected(number, self._scheduler.state()))
            case Ping():
                self._emit(Pong())
            case Stop():
                self._stopping = True
        if event is not None:
            events.append(event)

    def _report(self, events: list[RequestEvent], step_s: float, plans_s: list[float]) -> None:
        scores = [event for event in events if isinstance(event, PromptLogprobs)]
        *parts, last = _bounded(scores)
        started = [event for event in events if isinstance(event, StartedEvent)]
        for part in parts:  # the step is complete with the last
            self._emit(StepEvents(started, part, [], [], [], self._view, step_s=0.0))
            started = []
        self._view = self._scheduler.view()
        self._emit(
            StepEvents(
                started=started,
                prompt_logprobs=last,
                tokens=[event for event in events if isinstance(event, TokenEvent)],
                finished=[event for event in events if isinstance(event, FinishedEvent)],
                rejected=[event for event in events if isinstance(event, RejectedEvent)],
                view=self._view,
                step_s=step_s,
                plans_s=plans_s,
            )
        )


def _bounded(scores: list[PromptLogprobs]) -> list[list[PromptLogprobs]]:
    """Return the scores in as many lists as it takes for none to be too long; at least one."""
    lists: list[list[PromptLogprobs]] = [[]]
    room = MAX_SCORED_POSITIONS
    for event in scores:
        at = 0
        while at < len(event.positions):
            if not room:
                lists.append([])
                room = MAX_SCORED_POSITIONS
            positions = event.positions[at : at + room]
            lists[-1].append(event._replace(start=event.start + at, positions=positions))
            at += len(positions)
            room -= len(positions)
    return lists
