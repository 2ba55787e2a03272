"""How streams end: what the client is told, what is counted, what is logged. Each ends once.

It decides nothing; the driver says when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from scheduler.cluster.events import Cancelled, ClusterEvent
from scheduler.types import FinishReason, RequestId
from serving import logs
from serving.cluster.streams import RequestStream, StreamTable
from serving.errors import GenerationFailed, RequestError
from serving.metrics import Metrics

log = logging.getLogger(__name__)


class StreamEnds:
    """Takes streams out of the table when they end. Belongs to the event loop's thread."""

    def __init__(
        self,
        streams: StreamTable,
        metrics: Metrics,
        clock: Callable[[], float],
        tell: Callable[[ClusterEvent], None],
    ) -> None:
        """`tell` takes word to the cluster scheduler."""
        self._streams = streams
        self._metrics = metrics
        self._clock = clock
        self._tell = tell
        self.idle = asyncio.Event()  # no stream is open
        self.idle.set()
        self.num_errors = 0  # streams that ended by a fault of ours

    def open(self, stream: RequestStream) -> None:
        self._streams.add(stream)
        self.idle.clear()

    def finish(self, stream: RequestStream, reason: FinishReason) -> None:
        try:
            stream.finish(reason)
        except Exception as error:  # noqa: BLE001
            self.break_off(stream, error)
        else:
            self._forget(stream, reason.value)

    def break_off(self, stream: RequestStream, error: Exception) -> None:
        """A fault of ours with one request ends this one alone: its neighbours go on."""
        request_id = stream.spec.request_id
        logs.failure(log, "no answer could be made of tokens", error, request_id=request_id)
        self.fail(request_id, GenerationFailed())
        self._tell(Cancelled(request_id))

    def fail(self, request_id: RequestId, error: RequestError, outcome: str = "error") -> None:
        """End it with an error, if it is open."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self.num_errors += outcome == "error"
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
            self.idle.set()
