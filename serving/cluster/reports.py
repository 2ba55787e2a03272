"""What a step's report means for streams and for the cluster scheduler; nothing is decided here.

What an instance says of a request that is no longer its own is dropped: the request went on
elsewhere, and its tokens come from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from engine.messages import StepEvents
from scheduler.cluster.events import (
    PROGRESS_MARKS,
    Cancelled,
    ClusterEvent,
    Ended,
    FirstToken,
    Progressed,
    Reported,
)
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    InstanceId,
    PromptLogprobs,
    RejectReason,
    RequestId,
    StartedEvent,
    TokenEvent,
)
from serving import logs
from serving.cluster.ends import StreamEnds
from serving.cluster.streams import StreamGroup, StreamTable
from serving.errors import GenerationFailed
from serving.metrics import Metrics

log = logging.getLogger(__name__)


class StepReports:
    """Belongs to the event loop's thread."""

    def __init__(
        self,
        streams: StreamTable,
        ends: StreamEnds,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        owner: Callable[[RequestId], InstanceId | None],
        tell: Callable[[ClusterEvent], None],
        reject: Callable[[RequestId, RejectReason], None],
    ) -> None:
        """`owner` says whose a request is, `tell` takes word to the cluster scheduler."""
        self._streams = streams
        self._ends = ends
        self._metrics = metrics
        self._clock = clock
        self._owner = owner
        self._tell = tell
        self._reject = reject

    def take(self, instance_id: InstanceId, report: StepEvents) -> None:
        owner = self._owner
        self._begin(instance_id, report)
        began_s = self._clock()
        groups, gaps_s = self._deliver(instance_id, report.tokens, began_s)
        took_s = self._clock() - began_s
        # Before the ends, so that what they make room for goes by what is true now.
        self._tell(Reported(instance_id, report.view))
        for finished in report.finished:
            if owner(finished.request_id) == instance_id:
                self._on_finished(finished)
            self._tell(Ended(finished.request_id, instance_id))
        for rejected in report.rejected:
            if owner(rejected.request_id) == instance_id:
                self._reject(rejected.request_id, rejected.reason)
            self._tell(Ended(rejected.request_id, instance_id))
        self._tell_readers(groups)  # now that all is there that the step has brought for each
        # Behind what clients wait for.
        if report.tokens:
            self._metrics.next_tokens(gaps_s)
            self._metrics.delivered(took_s)
        self._metrics.step(instance_id, report.view, report.step_s, report.plans_s)

    def _begin(self, instance_id: InstanceId, report: StepEvents) -> None:
        owner = self._owner
        for started in report.started:
            if owner(started.request_id) == instance_id:
                self._on_started(started)
        for scored in report.prompt_logprobs:
            if owner(scored.request_id) == instance_id:
                self._on_prompt_logprobs(scored)

    def _deliver(
        self, instance_id: InstanceId, tokens: Sequence[TokenEvent], now: float
    ) -> tuple[Iterable[StreamGroup], list[float]]:
        """Return whose readers are to be told, in order, and the times since the last tokens."""
        owner, stream_of = self._owner, self._streams.get
        # Who waits for a first token is not to wait for the next ones of all others.
        firsts: dict[StreamGroup, None] = {}
        others: dict[StreamGroup, None] = {}
        gaps_s: list[float] = []
        for token in tokens:
            request_id, output_index, token_id, logprobs = token
            stream = stream_of(request_id)
            if stream is None or owner(request_id) != instance_id:
                continue  # its client left while the step ran, or it went on elsewhere
            if stream.awaits_token:
                stream.awaits_token = False
                firsts[stream.group] = None
                self._tell(FirstToken(request_id, instance_id))
            else:
                others[stream.group] = None
            num_tokens = output_index + 1 - stream.num_brought_tokens
            if num_tokens in PROGRESS_MARKS:
                self._tell(Progressed(request_id, instance_id, num_tokens))
            if stream.has_readers:
                gap_s = stream.marks.token(now)
                if gap_s is None:
                    self._metrics.first_token(stream.spec, stream.times)
                else:
                    gaps_s.append(gap_s)
            try:
                is_stopped = stream.deliver(output_index, token_id, logprobs)
            except Exception as error:  # noqa: BLE001
                self._ends.break_off(stream, error)
                continue
            if is_stopped:
                self._ends.finish(stream, FinishReason.STOP)
                self._tell(Cancelled(request_id, stream.num_tokens))
        return firsts | others, gaps_s

    def _tell_readers(self, groups: Iterable[StreamGroup]) -> None:
        for group in groups:
            try:
                group.tell()
            except Exception as error:  # noqa: BLE001
                for stream in group.streams:
                    self._ends.break_off(stream, error)

    def _on_started(self, event: StartedEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None or not stream.marks.started(event.queue_s):
            return  # it was counted when it began, wherever that was
        stream.num_cached_tokens = event.num_cached_tokens
        if stream.observer is not None:
            stream.observer.started(event.request_id)
        queue_s = stream.marks.queue_s or 0.0
        num_prompt_tokens = len(stream.spec.prompt_token_ids)
        self._metrics.started(num_prompt_tokens, event.num_cached_tokens, queue_s)

    def _on_prompt_logprobs(self, event: PromptLogprobs) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        try:
            stream.take_prompt_logprobs(event.start, event.positions)
        except Exception as error:  # noqa: BLE001
            self._ends.break_off(stream, error)

    def _on_finished(self, event: FinishedEvent) -> None:
        self._metrics.finished(event.num_preemptions)
        stream = self._streams.get(event.request_id)
        if event.reason is FinishReason.ERROR:
            failed = {"request_id": event.request_id}
            words = "a request failed in the model"
            logs.event(log, logging.ERROR, words, **failed, cause=event.error)
            logs.event(log, logging.DEBUG, "it failed here", **failed, trace=event.detail or None)
            self._ends.fail(event.request_id, GenerationFailed())
        elif stream is not None:
            self._ends.finish(stream, event.reason)
