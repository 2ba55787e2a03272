"""What a step's report means for streams and for the cluster scheduler; nothing is decided here.

What an instance says of a request that is no longer its own is dropped: the request went on
elsewhere, and its tokens come from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

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
from serving.cluster.streams import StreamTable
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
        self._on_progress(instance_id, report)
        # Before the ends, so that what they make room for goes by what is true now.
        self._metrics.step(instance_id, report.view, report.step_s, report.plans_s)
        self._tell(Reported(instance_id, report.view))
        for finished in report.finished:
            if owner(finished.request_id) == instance_id:
                self._on_finished(finished)
            self._tell(Ended(finished.request_id, instance_id))
        for rejected in report.rejected:
            if owner(rejected.request_id) == instance_id:
                self._reject(rejected.request_id, rejected.reason)
            self._tell(Ended(rejected.request_id, instance_id))

    def _on_progress(self, instance_id: InstanceId, report: StepEvents) -> None:
        owner = self._owner
        for started in report.started:
            if owner(started.request_id) == instance_id:
                self._on_started(started)
        for scored in report.prompt_logprobs:
            if owner(scored.request_id) == instance_id:
                self._on_prompt_logprobs(scored)
        if report.tokens:
            now = self._clock()
            tokens = [token for token in report.tokens if owner(token.request_id) == instance_id]
            # Answers are written in the order in which their readers are woken: who waits for a
            # first token is not to wait for the next ones of all others.
            tokens.sort(key=lambda token: not self._is_awaited(token.request_id))
            for token in tokens:
                self._on_token(token, instance_id, now)
            self._metrics.delivered(self._clock() - now)

    def _is_awaited(self, request_id: RequestId) -> bool:
        stream = self._streams.get(request_id)
        return stream is not None and stream.awaits_token

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

    def _on_token(self, event: TokenEvent, instance_id: InstanceId, now: float) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:  # its client left while the step ran
            return
        if stream.awaits_token:
            stream.awaits_token = False
            self._tell(FirstToken(event.request_id, instance_id))
        num_tokens = event.output_index + 1 - stream.num_brought_tokens
        if num_tokens in PROGRESS_MARKS:
            self._tell(Progressed(event.request_id, instance_id, num_tokens))
        if stream.has_readers:
            gap_s = stream.marks.token(now)
            if gap_s is None:
                self._metrics.first_token(stream.spec, stream.times)
            else:
                self._metrics.next_token(gap_s)
        try:
            is_stopped = stream.deliver(event.output_index, event.token_id, event.logprobs)
        except Exception as error:  # noqa: BLE001
            self._ends.break_off(stream, error)
            return
        if is_stopped:
            self._ends.finish(stream, FinishReason.STOP)
            self._tell(Cancelled(event.request_id, stream.num_tokens))

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
