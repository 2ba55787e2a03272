"""Drives the cluster scheduler over real instances: events in, actions out, each performed once.

It decides nothing. It owns the handles and the stream table, and belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never

from engine import messages
from engine.messages import Failed, Inspected, Pong, Ready, Report, StepEvents
from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    ClusterEvent,
    Dispatch,
    DrainStarted,
    Ended,
    Fail,
    InstanceDown,
    InstanceUp,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    InstanceId,
    PromptLogprobs,
    RejectReason,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)
from serving import logs
from serving.admission import jittered
from serving.cluster.handle import InstanceHandle
from serving.cluster.inspection import Inspections
from serving.cluster.rejection import Waits, error_of
from serving.cluster.streams import Observer, Origin, RequestStream, StreamGroup, StreamTable
from serving.errors import (
    GenerationFailed,
    InstanceLost,
    RequestError,
    Unavailable,
)
from serving.metrics import Metrics
from serving.telemetry.table import Endpoint
from serving.text.detokenizer import PLAIN_TEXT, Shown
from serving.text.tokenizer import TextCodec

log = logging.getLogger(__name__)


class ClusterDriver:
    """Requests in, streams out."""

    def __init__(
        self,
        scheduler: ClusterScheduler,
        codec: TextCodec,
        metrics: Metrics,
        *,
        max_requests_per_instance: int,
        retry_after_s: Callable[[RequestId], float] = lambda _: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._metrics = metrics
        self._max_requests = max_requests_per_instance
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._handles: dict[InstanceId, InstanceHandle] = {}  # the last incarnation of each
        self._lost: dict[InstanceId, asyncio.Future[str]] = {}  # done, with the cause, when it is
        self._streams = StreamTable()
        self._inspections = Inspections()
        self._idle = asyncio.Event()
        self._idle.set()
        self._up_at_s = 0.0  # when an instance should be up again, while none is
        self.draining = False
        self._has_cut_off = False  # a request that had been accepted, since the drain began

    @property
    def ready(self) -> bool:
        """Whether a request that came now would be served."""
        return self._scheduler.accepts

    @property
    def alive(self) -> bool:
        """Whether an instance is up: also when it drains or is full, which is no illness."""
        return self._scheduler.num_instances > 0

    async def start(self, handle: InstanceHandle) -> Ready:
        """Bring an instance up and give it work from now on. Raises UserError if it cannot start.

        If it is a new incarnation, what the old one may still say is dropped.
        """
        instance_id = handle.instance_id
        lost = self._lost[instance_id] = asyncio.get_running_loop().create_future()
        self._handles[instance_id] = handle
        ready = await handle.start(partial(self._on_report, handle))
        if not lost.done():  # else it was lost at once, and that is told to who waits for it
            self._metrics.instance_ready(instance_id, ready)
            self._handle(InstanceUp(instance_id, self._max_requests))
        return ready

    def expect_up(self, at_s: float) -> None:
        """An instance that was lost will be back at about this time."""
        self._up_at_s = at_s

    @property
    def up_in_s(self) -> float:
        """Return how long those should wait who find no instance; at least a second."""
        return max(1.0, self._up_at_s - self._clock())

    @property
    def num_streams(self) -> int:
        """Requests that have not ended, each choice counted."""
        return len(self._streams)

    async def until_lost(self, handle: InstanceHandle) -> str:
        """Wait for the end of the instance; return the cause."""
        return await asyncio.shield(self._lost[handle.instance_id])

    def submit(
        self,
        specs: Sequence[RequestSpec],
        stops: Sequence[str],
        shown: Shown = PLAIN_TEXT,
        observer: Observer | None = None,
        *,
        arrived_at_s: float | None = None,
        endpoint: Endpoint = Endpoint.COMPLETIONS,
    ) -> StreamGroup:
        """Run the requests; all of them, or none. Raises RequestError when one is refused.

        They arrived at `arrived_at_s` of the driver's clock, or do so now.
        """
        group = StreamGroup()
        now = self._clock()
        origin = Origin(endpoint, now if arrived_at_s is None else arrived_at_s, now)
        for spec in specs:
            stream = RequestStream(
                spec,
                self._codec,
                stops,
                group.wake,
                shown,
                observer,
                origin=origin,
            )
            self._streams.add(stream)
            self._idle.clear()
            group.streams.append(stream)
            self._handle(Arrived(spec))
            if stream.error is not None:
                self.cancel(group)
                raise stream.error
        self._metrics.accepted(specs)
        return group

    def cancel(self, group: StreamGroup) -> None:
        """The client is gone, or wants no more: end what still runs of the group."""
        for stream in group.streams:
            if not stream.ended:
                self._end(stream, FinishReason.ABORT)
                self._handle(Cancelled(stream.spec.request_id))

    def fail(self, group: StreamGroup, error: RequestError, outcome: str) -> None:
        """End what still runs of the group, and tell its client why."""
        for stream in group.streams:
            if not stream.ended:
                self._fail(stream.spec.request_id, error, outcome)
                self._handle(Cancelled(stream.spec.request_id))

    def begin_drain(self) -> int:
        """Refuse new requests from now on; return how many are still to end."""
        if not self.draining:
            self.draining = True
            self._handle(DrainStarted())
        return len(self._streams)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those accepted end. False if some were cut off or failed."""
        self.begin_drain()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for request_id in self._streams.open_ids():
                cut_off = Unavailable(
                    "the server shut down",
                    code="draining",
                    retry_after_s=self._retry_after_s(request_id),
                )
                self._fail(request_id, cut_off)
                self._handle(Cancelled(request_id))
        return not self._has_cut_off

    async def inspect(self, timeout_s: float) -> dict[str, Any]:
        """Return what instances, streams and the cluster scheduler hold, for people to read.

        An instance that is down is shown as None. Raises Unavailable when one gives no answer in
        time.
        """
        up = [
            handle
            for instance_id, handle in self._handles.items()
            if self._scheduler.is_up(instance_id)
        ]
        answers = await self._inspections.ask(up, timeout_s)
        return {
            "instances": {key: answers.get(key) for key in self._handles},
            "streams": self._streams.state(),
            "cluster": self._scheduler.state(),
        }

    async def stop(self) -> None:
        await asyncio.gather(*(handle.stop() for handle in self._handles.values()))

    # --- events to actions ---

    def _handle(self, event: ClusterEvent) -> None:
        for action in self._scheduler.handle(event, self._clock()):
            match action:
                case Dispatch(spec, instance_id):
                    self._handles[instance_id].send(messages.Submit(spec))
                case Abort(request_id, instance_id, num_output_tokens):
                    abort = messages.Abort(request_id, num_output_tokens)
                    self._handles[instance_id].send(abort)
                case Reject(request_id, reason):
                    self._reject(request_id, reason)
                case Fail(request_id):
                    self._fail(request_id, InstanceLost("the instance that ran this failed"))
                case _:
                    assert_never(action)

    # --- reports from instances ---

    def _on_report(self, handle: InstanceHandle, report: Report) -> None:
        instance_id = handle.instance_id
        if self._handles.get(instance_id) is not handle:
            return
        match report:
            case StepEvents():
                self._on_step(instance_id, report)
            case Failed(cause, trace):
                logs.event(log, logging.ERROR, "instance failed", instance=instance_id, cause=cause)
                logs.event(log, logging.DEBUG, "instance was here", trace=trace)
                self._lost[instance_id].set_result(cause)
                self._metrics.instance_down(instance_id)
                self._inspections.lost(instance_id)
                self._handle(InstanceDown(instance_id))
            case Inspected(number, state):
                self._inspections.answered(number, state)
            case Ready() | Pong():
                pass
            case _:
                assert_never(report)

    def _on_step(self, instance_id: InstanceId, report: StepEvents) -> None:
        for started in report.started:
            self._on_started(started)
        for scored in report.prompt_logprobs:
            self._on_prompt_logprobs(scored)
        if report.tokens:
            now = self._clock()
            for token in report.tokens:
                self._on_token(token, now)
            self._metrics.delivered(self._clock() - now)
        for finished in report.finished:
            self._on_finished(finished)
        for rejected in report.rejected:
            self._reject(rejected.request_id, rejected.reason)
            self._handle(Ended(rejected.request_id))
        self._metrics.step(instance_id, report.view, report.step_s, report.plans_s)
        self._handle(Reported(instance_id, report.view))

    def _on_started(self, event: StartedEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            stream.num_cached_tokens = event.num_cached_tokens
            stream.marks.started(event.queue_s)
            if stream.observer is not None:
                stream.observer.started(event.request_id)
            num_prompt_tokens = len(stream.spec.prompt_token_ids)
            self._metrics.started(num_prompt_tokens, event.num_cached_tokens, event.queue_s)

    def _on_prompt_logprobs(self, event: PromptLogprobs) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        try:
            stream.take_prompt_logprobs(event.start, event.positions)
        except Exception as error:  # noqa: BLE001
            self._break_off(stream, error)

    def _on_token(self, event: TokenEvent, now: float) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:  # its client left while the step ran
            return
        if stream.has_readers:
            gap_s = stream.marks.token(now)
            if gap_s is None:
                self._metrics.first_token(stream.spec, stream.times)
            else:
                self._metrics.next_token(gap_s)
        try:
            is_stopped = stream.deliver(event.output_index, event.token_id, event.logprobs)
        except Exception as error:  # noqa: BLE001
            self._break_off(stream, error)
            return
        if is_stopped:
            self._end(stream, FinishReason.STOP)
            self._handle(Cancelled(event.request_id, stream.num_tokens))

    def _on_finished(self, event: FinishedEvent) -> None:
        self._metrics.finished(event.num_preemptions)
        stream = self._streams.get(event.request_id)
        if event.reason is FinishReason.ERROR:
            failed = {"request_id": event.request_id}
            words = "a request failed in the model"
            logs.event(log, logging.ERROR, words, **failed, cause=event.error)
            logs.event(log, logging.DEBUG, "it failed here", **failed, trace=event.detail or None)
            self._fail(event.request_id, GenerationFailed())
        elif stream is not None:
            self._end(stream, event.reason)
        self._handle(Ended(event.request_id))

    # --- the ends of streams ---

    def _end(self, stream: RequestStream, reason: FinishReason) -> None:
        try:
            stream.finish(reason)
        except Exception as error:  # noqa: BLE001
            self._break_off(stream, error)
        else:
            self._forget(stream, reason.value)

    def _break_off(self, stream: RequestStream, error: Exception) -> None:
        """A fault of ours with one request ends this one alone: its neighbours go on."""
        request_id = stream.spec.request_id
        logs.failure(log, "no answer could be made of tokens", error, request_id=request_id)
        self._fail(request_id, GenerationFailed())
        self._handle(Cancelled(request_id))

    def _reject(self, request_id: RequestId, reason: RejectReason) -> None:
        self._metrics.rejected(reason)
        waits = Waits(self._retry_after_s(request_id), jittered(self.up_in_s, request_id))
        self._fail(request_id, error_of(reason, waits, draining=self.draining), "rejected")

    def _fail(self, request_id: RequestId, error: RequestError, outcome: str = "error") -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            self._has_cut_off |= self.draining and outcome == "error"
            stream.fail(error)
            self._forget(stream, outcome)

    def _forget(self, stream: RequestStream, outcome: str) -> None:
        self._streams.remove(stream.spec.request_id)
        if stream.observer is not None:
            stream.observer.ended(stream.spec.request_id)
        stream.marks.ended(self._clock())
        times = stream.times
        self._metrics.ended(stream.endpoint, outcome, stream.spec, stream.num_cached_tokens, times)
        if log.isEnabledFor(logging.DEBUG):
            logs.event(
                log,
                logging.DEBUG,
                "ended",
                request_id=stream.spec.request_id,
                outcome=outcome,
                num_prompt_tokens=len(stream.spec.prompt_token_ids),
                num_cached_tokens=stream.num_cached_tokens,
                num_output_tokens=times.num_tokens,
                intake_s=times.intake_s,
                queue_s=times.queue_s,
                ttft_s=times.ttft_s,
                decode_s=times.decode_s,
                e2e_s=times.e2e_s,
            )
        if not len(self._streams):
            self._idle.set()
