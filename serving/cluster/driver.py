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
    Elapsed,
    Fail,
    FailReason,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    MoveAway,
    Reject,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import FinishReason, InstanceId, RejectReason, RequestId, RequestSpec
from serving import logs
from serving.admission import jittered
from serving.cluster.ends import StreamEnds
from serving.cluster.handle import InstanceHandle
from serving.cluster.inspection import Inspections
from serving.cluster.instances import Drained, Incarnation, InstanceStatus, capacity_of
from serving.cluster.rejection import Waits, error_of, failure_of
from serving.cluster.reports import StepReports
from serving.cluster.streams import Observer, Origin, RequestStream, StreamGroup, StreamTable
from serving.errors import RequestError, Unavailable
from serving.metrics import Metrics
from serving.telemetry.table import Endpoint
from serving.text.detokenizer import PLAIN_TEXT, Shown
from serving.text.tokenizer import TextCodec

log = logging.getLogger(__name__)

_TICK_S = 0.25  # how often it is looked whether what is waited for has come


class ClusterDriver:
    """Requests in, streams out."""

    def __init__(
        self,
        scheduler: ClusterScheduler,
        codec: TextCodec,
        metrics: Metrics,
        *,
        retry_after_s: Callable[[RequestId], float] = lambda _: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._metrics = metrics
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._instances: dict[InstanceId, Incarnation] = {}  # the last of each
        self._streams = StreamTable()
        self._ends = StreamEnds(self._streams, metrics, clock, self._handle)
        self._reports = StepReports(
            self._streams,
            self._ends,
            metrics,
            clock=clock,
            owner=scheduler.owner,
            tell=self._handle,
            reject=self._reject,
        )
        self._inspections = Inspections()
        self._tick: asyncio.TimerHandle | None = None
        self._up_at_s = 0.0  # when an instance should be up again, while none is
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request that came now would be served."""
        return self._scheduler.accepts

    @property
    def alive(self) -> bool:
        """Whether an instance is up: also when it drains or is full, which is no illness."""
        return self._scheduler.num_instances > 0

    @property
    def num_streams(self) -> int:
        """Requests that have not ended, each choice counted."""
        return len(self._streams)

    @property
    def num_queued(self) -> int:
        """Requests that no instance has."""
        return self._scheduler.num_queued

    # --- instances come and go ---

    async def start(self, handle: InstanceHandle) -> Ready:
        """Bring an instance up and give it work from now on. Raises UserError if it cannot start.

        If it is a new incarnation, what the old one may still say is dropped. One whose last
        incarnation was drained, and was lost, comes up drained.
        """
        instance_id = handle.instance_id
        before = self._instances.get(instance_id)
        incarnation = self._instances[instance_id] = Incarnation(handle)
        incarnation.is_draining = before is not None and before.is_draining
        ready = incarnation.ready = await handle.start(partial(self._on_report, incarnation))
        if not incarnation.lost.done():  # else it was lost at once, and that is told who waits
            self._metrics.instance_ready(instance_id, ready)
            is_draining = incarnation.is_draining
            self._handle(InstanceUp(instance_id, capacity_of(ready), is_draining))
        return ready

    def expect_up(self, at_s: float) -> None:
        """An instance that was lost will be back at about this time."""
        self._up_at_s = at_s

    @property
    def up_in_s(self) -> float:
        """Return how long those should wait who find no instance; at least a second."""
        return max(1.0, self._up_at_s - self._clock())

    async def until_lost(self, handle: InstanceHandle) -> str:
        """Wait for the end of the instance; return the cause."""
        return await asyncio.shield(self._instances[handle.instance_id].lost)

    async def drain_instance(self, instance_id: InstanceId, timeout_s: float) -> Drained:
        """Give an instance no new work, and wait until it has none.

        What is left after `timeout_s` goes on elsewhere, as soon as another instance takes
        requests. The instance stays up; if it is lost meanwhile, it has none.
        """
        incarnation = self._instances[instance_id]
        incarnation.is_draining = True
        began_s, num_moved = self._clock(), 0
        self._handle(InstanceDraining(instance_id))
        is_empty = await incarnation.is_empty_within(timeout_s)
        while not is_empty and not self._scheduler.is_open:
            is_empty = await incarnation.is_empty_within(_TICK_S)
        if not is_empty:
            num_moved = self._num_owned(instance_id)
            self._handle(MoveAway(instance_id))
            await incarnation.is_empty.wait()
        return Drained(self._clock() - began_s, num_moved)

    def _num_owned(self, instance_id: InstanceId) -> int:
        """Return how many requests it runs that somebody waits for."""
        owner = self._scheduler.owner
        return sum(owner(request_id) == instance_id for request_id in self._streams.open_ids())

    async def remove_instance(self, instance_id: InstanceId) -> None:
        """End an instance, if it is there, and forget it; what it still runs goes on elsewhere."""
        incarnation = self._instances.pop(instance_id, None)
        if incarnation is not None:
            self._lose(instance_id, was_ours=True)
            incarnation.is_empty.set()
            self._metrics.instance_removed(instance_id)
            await incarnation.handle.stop()

    def instances(self) -> list[InstanceStatus]:
        """Return every instance as it stands, by id."""
        ledgers = self._scheduler.ledgers()
        shown = []
        for instance_id, incarnation in self._instances.items():
            ready, ledger = incarnation.ready, ledgers.get(instance_id)
            status = InstanceStatus(instance_id=instance_id, state="down")
            if ready is not None and ledger is not None:
                status = InstanceStatus(
                    instance_id=instance_id,
                    state="draining" if ledger.is_draining else "up",
                    model=ready.model_name,
                    dtype=ready.dtype,
                    device=ready.device,
                    num_assigned=len(ledger.assigned),
                    num_running=ledger.view.num_running,
                    num_waiting=ledger.view.num_waiting,
                    kv_usage=ledger.view.kv_usage,
                    freeness=ledger.freeness,
                )
            shown.append(status)
        return shown

    # --- requests ---

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
                group,
                shown,
                observer,
                origin=origin,
            )
            self._ends.open(stream)
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
                self._ends.finish(stream, FinishReason.ABORT)
                self._handle(Cancelled(stream.spec.request_id))

    def fail(self, group: StreamGroup, error: RequestError, outcome: str) -> None:
        """End what still runs of the group, and tell its client why."""
        for stream in group.streams:
            if not stream.ended:
                self._ends.fail(stream.spec.request_id, error, outcome)
                self._handle(Cancelled(stream.spec.request_id))

    def begin_drain(self) -> int:
        """Refuse new requests from now on; return how many are still to end."""
        if not self.draining:
            self.draining = True
            self._ends.num_errors = 0
            self._handle(DrainStarted())
        return len(self._streams)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those accepted end. False if some were cut off or failed."""
        self.begin_drain()
        try:
            await asyncio.wait_for(self._ends.idle.wait(), timeout_s)
        except TimeoutError:
            for request_id in self._streams.open_ids():
                cut_off = Unavailable(
                    "the server shut down",
                    code="draining",
                    retry_after_s=self._retry_after_s(request_id),
                )
                self._ends.fail(request_id, cut_off)
                self._handle(Cancelled(request_id))
        return not self._ends.num_errors

    async def inspect(self, timeout_s: float) -> dict[str, Any]:
        """Return what instances, streams and the cluster scheduler hold, for people to read.

        An instance that is down is shown as None. Raises Unavailable when one gives no answer in
        time.
        """
        up = [self._instances[key].handle for key in self._scheduler.ledgers()]
        answers = await self._inspections.ask(up, timeout_s)
        return {
            "instances": {key: answers.get(key) for key in self._instances},
            "streams": self._streams.state(),
            "cluster": self._scheduler.state(),
        }

    async def stop(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        instances = list(self._instances.values())
        await asyncio.gather(*(incarnation.handle.stop() for incarnation in instances))

    # --- events to actions ---

    def _handle(self, event: ClusterEvent) -> None:
        for action in self._scheduler.handle(event, self._clock()):
            match action:
                case Dispatch():
                    self._dispatch(action)
                case Abort(request_id, instance_id, num_output_tokens):
                    abort = messages.Abort(request_id, num_output_tokens)
                    self._instances[instance_id].handle.send(abort)
                case Reject(request_id, reason):
                    self._reject(request_id, reason)
                case Fail(request_id, why):
                    self._fail(request_id, why)
                case _:
                    assert_never(action)
        self._metrics.queued(self._scheduler.num_queued)
        if self._scheduler.num_queued and self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(_TICK_S, self._on_tick)
        for instance_id, incarnation in self._instances.items():
            if incarnation.is_draining and not self._scheduler.num_assigned(instance_id):
                incarnation.is_empty.set()

    def _on_tick(self) -> None:
        self._tick = None
        self._handle(Elapsed())

    def _dispatch(self, action: Dispatch) -> None:
        request_id = action.spec.request_id
        stream = self._streams.get(request_id)
        assert stream is not None, f"{request_id} has no client"
        stream.marks.dispatched(self._clock())
        stream.awaits_token = True
        stream.num_brought_tokens = stream.num_tokens
        submit = messages.Submit(action.spec, tuple(stream.token_ids))
        self._instances[action.instance_id].handle.send(submit)
        self._metrics.dispatched(action.instance_id, is_replay=stream.was_dispatched)
        stream.was_dispatched = True

    # --- reports from instances ---

    def _on_report(self, incarnation: Incarnation, report: Report) -> None:
        instance_id = incarnation.handle.instance_id
        if self._instances.get(instance_id) is not incarnation:
            return
        match report:
            case StepEvents():
                self._reports.take(instance_id, report)
            case Failed(cause, trace):
                logs.event(log, logging.ERROR, "instance failed", instance=instance_id, cause=cause)
                logs.event(log, logging.DEBUG, "instance was here", trace=trace)
                incarnation.lost.set_result(cause)
                self._lose(instance_id)
            case Inspected(number, state):
                self._inspections.answered(number, state)
            case Ready() | Pong():
                pass
            case _:
                assert_never(report)

    def _lose(self, instance_id: InstanceId, *, was_ours: bool = False) -> None:
        self._metrics.instance_down(instance_id)
        self._inspections.lost(instance_id)
        self._handle(InstanceDown(instance_id, was_ours))

    def _fail(self, request_id: RequestId, why: FailReason) -> None:
        stream = self._streams.get(request_id)
        had_instance = stream is not None and stream.was_dispatched
        error = failure_of(why, self._waits(request_id), had_instance=had_instance)
        self._ends.fail(request_id, error)
        cause = {"request_id": request_id, "reason": why.value}
        logs.event(log, logging.ERROR, "a request cannot go on", **cause)

    def _reject(self, request_id: RequestId, reason: RejectReason) -> None:
        self._metrics.rejected(reason)
        error = error_of(reason, self._waits(request_id), draining=self.draining)
        self._ends.fail(request_id, error, "rejected")

    def _waits(self, request_id: RequestId) -> Waits:
        return Waits(self._retry_after_s(request_id), jittered(self.up_in_s, request_id))
