"""What clients have been given of each request: the only owner of text and of delivered tokens.

A stream takes token events in order, exactly once, and turns them into text. Stop strings are
matched here; what was computed beyond one is dropped and counts for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from scheduler.types import FinishReason, RequestId, RequestSpec
from serving.errors import RequestError
from serving.text.detokenizer import Detokenizer, StopFilter
from serving.text.tokenizer import TextCodec


class Delta(NamedTuple):
    """What is new for a client; with a finish reason it is the last."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class RequestStream:
    """One request as its client sees it. Belongs to the event loop's thread."""

    def __init__(
        self, spec: RequestSpec, codec: TextCodec, stops: Sequence[str], wake: asyncio.Event
    ) -> None:
        self.spec = spec
        self.num_tokens = 0  # delivered
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.first_token_at_s: float | None = None
        self.last_token_at_s: float | None = None
        self._detokenizer = Detokenizer(codec)
        self._stop_filter = StopFilter(stops)
        self._wake = wake
        self._new_token_ids: list[int] = []
        self._new_text = ""
        self._end_is_new = False

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def deliver(self, output_index: int, token_id: int) -> bool:
        """Take the token with this output index. True if it completed a stop string.

        A token of an ended stream is dropped: it was computed before the instance knew.
        """
        if self.ended:
            return False
        if output_index != self.num_tokens:
            raise AssertionError(
                f"{self.spec.request_id}: token {output_index}, not {self.num_tokens}"
            )
        self.num_tokens += 1
        self._new_token_ids.append(token_id)
        if token_id not in self.spec.params.stop_token_ids:
            self._new_text += self._stop_filter.push(self._detokenizer.push((token_id,)))
        self._wake.set()
        return self._stop_filter.matched is not None

    def finish(self, reason: FinishReason) -> None:
        """End the stream; what was held back is shown."""
        if not self.ended:
            if self._stop_filter.matched is None:
                self._new_text += self._stop_filter.push(self._detokenizer.finish())
                self._new_text += self._stop_filter.finish()
            self.finish_reason = reason
            self._end_is_new = True
            self._wake.set()

    def fail(self, error: RequestError) -> None:
        if not self.ended:
            self.error = error
            self._wake.set()

    def take(self) -> Delta | None:
        """Return what came since the last call, None if nothing did."""
        if not (self._new_token_ids or self._end_is_new):
            return None
        delta = Delta(self._new_text, tuple(self._new_token_ids), self.finish_reason)
        self._new_text, self._new_token_ids, self._end_is_new = "", [], False
        return delta


class StreamGroup:
    """The streams of one HTTP request (choices, prompts), read as one."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.streams: list[RequestStream] = []

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (stream index, delta) until all have ended. Raises the first stream's error."""
        open_streams = dict(enumerate(self.streams))
        while open_streams:
            await self.wake.wait()
            self.wake.clear()
            for index, stream in list(open_streams.items()):
                if stream.error is not None:
                    raise stream.error
                delta = stream.take()
                if delta is not None:
                    yield index, delta
                    if delta.finish_reason is not None:
                        del open_streams[index]


class StreamTable:
    """Every stream that has not ended, by request id."""

    def __init__(self) -> None:
        self._streams: dict[RequestId, RequestStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: RequestStream) -> None:
        self._streams[stream.spec.request_id] = stream

    def get(self, request_id: RequestId) -> RequestStream | None:
        return self._streams.get(request_id)

    def remove(self, request_id: RequestId) -> RequestStream | None:
        return self._streams.pop(request_id, None)

    def open_ids(self) -> list[RequestId]:
        return list(self._streams)
