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
from engine.messages import Failed, Inspected, Ready, Report, StepEvents
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
    RejectReason,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)
from serving.cluster.handle import InstanceHandle
from serving.cluster.inspection import Inspections
from serving.cluster.streams import Observer, RequestStream, StreamGroup, StreamTable
from serving.errors import (
    GenerationFailed,
    InstanceLost,
    InvalidRequest,
    RequestError,
    Unavailable,
)
from serving.metrics import Metrics
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._metrics = metrics
        self._max_requests = max_requests_per_instance
        self._clock = clock
        self._handles: dict[InstanceId, InstanceHandle] = {}
        self._streams = StreamTable()
        self._inspections = Inspections()
        self._arrived_at_s: dict[RequestId, float] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request that came now would be served."""
        return self._scheduler.accepts

    @property
    def alive(self) -> bool:
        """Whether an instance is up."""
        return self._scheduler.num_instances > 0

    async def start(self, handle: InstanceHandle) -> Ready:
        """Bring an instance up and give it work from now on."""
        instance_id = handle.instance_id
        ready = await handle.start(partial(self._on_report, instance_id))
        self._handles[instance_id] = handle
        self._metrics.instance_up(instance_id, up=True)
        self._handle(InstanceUp(instance_id, self._max_requests))
        return ready

    def submit(
        self,
        specs: Sequence[RequestSpec],
        stops: Sequence[str],
        observer: Observer | None = None,
    ) -> StreamGroup:
        """Run the requests; all of them, or none. Raises RequestError when one is refused."""
        group = StreamGroup()
        for spec in specs:
            stream = RequestStream(spec, self._codec, stops, group.wake, observer)
            self._streams.add(stream)
            self._idle.clear()
            self._arrived_at_s[spec.request_id] = self._clock()
            group.streams.append(stream)
            self._handle(Arrived(spec))
            if stream.error is not None:
                self.cancel(group)
                raise stream.error
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

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those accepted end. False if some had to be cut off."""
        self.draining = True
        self._handle(DrainStarted())
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for request_id in self._streams.open_ids():
                self._fail(request_id, Unavailable("the server shut down", code="draining"))
                self._handle(Cancelled(request_id))
            return False
        return True

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
        for handle in self._handles.values():
            await handle.stop()

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
                    self._fail(request_id, self._refusal(reason), "rejected")
                case Fail(request_id):
                    self._fail(request_id, InstanceLost("the instance that ran this failed"))
                case _:
                    assert_never(action)

    def _refusal(self, reason: RejectReason) -> RequestError:
        match reason:
            case RejectReason.NEVER_FITS:
                return InvalidRequest("prompt and max_tokens can never fit into the KV memory")
            case RejectReason.QUEUE_FULL:
                return Unavailable("the server is full; try again shortly", code="queue_full")
            case RejectReason.NO_INSTANCE if self.draining:
                return Unavailable("the server is shutting down", code="draining")
            case RejectReason.NO_INSTANCE:
                return Unavailable("no instance is up", code="no_instance")
            case RejectReason.DUPLICATE_ID:
                return InvalidRequest("a request with this id is running", param="request_id")

    # --- reports from instances ---

    def _on_report(self, instance_id: InstanceId, report: Report) -> None:
        match report:
            case StepEvents():
                self._on_step(instance_id, report)
            case Failed(cause):
                log.error("instance %s failed: %s", instance_id, cause)
                self._metrics.instance_up(instance_id, up=False)
                self._inspections.lost(instance_id)
                self._handle(InstanceDown(instance_id))
            case Inspected(number, state):
                self._inspections.answered(number, state)
            case Ready():
                pass
            case _:
                assert_never(report)

    def _on_step(self, instance_id: InstanceId, report: StepEvents) -> None:
        now = self._clock()
        for started in report.started:
            self._on_started(started)
        for scored in report.prompt_logprobs:
            stream = self._streams.get(scored.request_id)
            if stream is not None:
                stream.take_prompt_logprobs(scored.start, scored.positions)
        for token in report.tokens:
            self._on_token(token, now)
        for finished in report.finished:
            self._on_finished(finished)
        for rejected in report.rejected:
            self._fail(rejected.request_id, self._refusal(rejected.reason), "rejected")
            self._handle(Ended(rejected.request_id))
        self._metrics.step(instance_id, report.view, report.step_s)
        self._handle(Reported(instance_id, report.view))

    def _on_started(self, event: StartedEvent) -> None:
        self._metrics.queued(event.queue_s)
        stream = self._streams.get(event.request_id)
        if stream is not None:
            stream.num_cached_tokens = event.num_cached_tokens
            if stream.observer is not None:
                stream.observer.started(event.request_id)
            self._metrics.prefix(len(stream.spec.prompt_token_ids), event.num_cached_tokens)

    def _on_token(self, event: TokenEvent, now: float) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:  # its client left while the step ran
            return
        last_at_s, stream.last_token_at_s = stream.last_token_at_s, now
        self._metrics.token(
            now - self._arrived_at_s[event.request_id],
            None if last_at_s is None else now - last_at_s,
        )
        if stream.deliver(event.output_index, event.token_id, event.logprobs):
            self._end(stream, FinishReason.STOP)
            self._handle(Cancelled(event.request_id, stream.num_tokens))

    def _on_finished(self, event: FinishedEvent) -> None:
        stream = self._streams.get(event.request_id)
        if event.reason is FinishReason.ERROR:
            log.error("request %s failed in the model: %s", event.request_id, event.error)
            self._fail(event.request_id, GenerationFailed(event.error))
        elif stream is not None:
            self._end(stream, event.reason)
        self._handle(Ended(event.request_id))

    # --- the ends of streams ---

    def _end(self, stream: RequestStream, reason: FinishReason) -> None:
        stream.finish(reason)
        self._forget(stream, reason.value)

    def _fail(self, request_id: RequestId, error: RequestError, outcome: str = "error") -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)
            self._forget(stream, outcome)

    def _forget(self, stream: RequestStream, outcome: str) -> None:
        request_id = stream.spec.request_id
        self._streams.remove(request_id)
        if stream.observer is not None:
            stream.observer.ended(request_id)
        e2e_s = self._clock() - self._arrived_at_s.pop(request_id)
        self._metrics.ended(outcome, len(stream.spec.prompt_token_ids), e2e_s)
        if not len(self._streams):
            self._idle.set()
