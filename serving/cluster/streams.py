"""What clients have been given of each request: the only owner of text and of delivered tokens.

A stream takes token events in order, exactly once, and turns them into text. Stop strings are
matched here; what was computed beyond one is dropped and counts for nothing. The log-probabilities
of a token are shown when its text is, and never if a stop string cut it off.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from scheduler.types import FinishReason, Logprobs, RequestId, RequestSpec
from serving.cluster.times import RequestMarks, RequestTimes
from serving.errors import RequestError
from serving.telemetry.table import Endpoint
from serving.text.detokenizer import PLAIN_TEXT, Detokenizer, Shown, StopFilter
from serving.text.tokenizer import TextCodec


class ScoredToken(NamedTuple):
    """A token with its log-probabilities, and where in the answer its text begins."""

    token_id: int
    logprobs: Logprobs | None  # None where the model gave none
    text_offset: int


class Delta(NamedTuple):
    """What is new for a client; with a finish reason it is the last."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    scored: tuple[ScoredToken, ...] = ()  # if log-probabilities were asked for


class News(NamedTuple):
    """What is new of several streams."""

    deltas: list[tuple[int, Delta]]  # by the index of the stream
    is_last: bool  # all have ended


class Origin(NamedTuple):
    """Where a request came from, and when, on the driver's clock."""

    endpoint: Endpoint = Endpoint.COMPLETIONS
    arrived_at_s: float = 0.0  # at the server
    taken_at_s: float = 0.0  # by the driver


_NOWHERE = Origin()


class Observer(Protocol):
    """Who wants to know how far requests are, beside their client."""

    def started(self, request_id: RequestId) -> None: ...

    def ended(self, request_id: RequestId) -> None: ...


class RequestStream:
    """One request as its client sees it. Belongs to the event loop's thread."""

    def __init__(
        self,
        spec: RequestSpec,
        codec: TextCodec,
        stops: Sequence[str],
        group: StreamGroup,
        shown: Shown = PLAIN_TEXT,
        observer: Observer | None = None,
        *,
        origin: Origin = _NOWHERE,
    ) -> None:
        self.spec = spec
        self.group = group
        self.endpoint = origin.endpoint
        self.observer = observer
        self.token_ids = array("I")  # delivered, of all its lives
        self.was_dispatched = False  # to an instance, so that another would be a replay
        self.awaits_token = False  # since it was handed to an instance
        self.num_brought_tokens = 0  # when it was handed to an instance
        self.num_cached_tokens = 0  # of the prompt; known when it has started
        self.prompt_logprobs: list[Logprobs] = []  # of the second token of the prompt and on
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.marks = RequestMarks(origin.arrived_at_s, origin.taken_at_s)
        self.has_readers = not shown.nothing  # if not, nobody counts its tokens
        self._hidden = () if shown.stop else spec.params.stop_token_ids  # they are no text
        self._detokenizer = Detokenizer(codec, skip_special_tokens=not shown.special_tokens)
        self._stop_filter = StopFilter(stops, shows_stop=shown.stop)
        self._is_plain = not stops and spec.params.logprobs is None  # all text is shown at once
        self._num_taken = 0  # tokens
        self._new_text = ""
        self._new_scored: list[ScoredToken] = []
        self._held_scored: list[ScoredToken] = []  # few: their text is not shown yet
        self._num_decoded_chars = 0
        self._num_shown_chars = 0
        self._end_is_new = False

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def num_tokens(self) -> int:
        """Delivered tokens."""
        return len(self.token_ids)

    @property
    def times(self) -> RequestTimes:
        """Where its time went so far."""
        return self.marks.times()

    def take_prompt_logprobs(self, start: int, positions: Sequence[Logprobs]) -> None:
        """Keep those of prompt tokens `start` and on; a prompt computed again may repeat some."""
        num_known = len(self.prompt_logprobs) + 1
        if start > num_known:
            raise AssertionError(
                f"{self.spec.request_id}: prompt logprobs from {start}, not {num_known}"
            )
        self.prompt_logprobs += positions[num_known - start :]

    def deliver(self, output_index: int, token_id: int, logprobs: Logprobs | None = None) -> bool:
        """Take the token with this output index. True if it completed a stop string.

        A token of an ended stream is dropped: it was computed before the instance knew. Its reader
        is told by `StreamGroup.tell`, once for all that a step brings.
        """
        if self.finish_reason is not None or self.error is not None:
            return False
        if output_index != len(self.token_ids):
            raise AssertionError(
                f"{self.spec.request_id}: token {output_index}, not {self.num_tokens}"
            )
        self.token_ids.append(token_id)
        if self._is_plain:
            if token_id not in self._hidden:
                self._new_text += self._detokenizer.push(token_id)
            return False
        if self.spec.params.logprobs is not None:
            self._held_scored.append(ScoredToken(token_id, logprobs, self._num_decoded_chars))
        if token_id not in self._hidden:
            self._show(self._detokenizer.push(token_id))
        self._release_scored()
        return self._stop_filter.matched is not None

    def finish(self, reason: FinishReason) -> None:
        """End the stream, with what was held back unless a stop string cut it off."""
        if not self.ended:
            if self._stop_filter.matched is None:
                self._show(self._detokenizer.finish())
                self._new_text += self._stop_filter.finish()
                self._release_scored(everything=self._stop_filter.matched is None)
            self.finish_reason = reason
            self._end_is_new = True
            self.group.wake.set()

    def fail(self, error: RequestError) -> None:
        if not self.ended:
            self.error = error
            self.group.wake.set()

    def take(self) -> Delta | None:
        """Return what came since the last call, None if nothing did."""
        new_token_ids = self.token_ids[self._num_taken :]
        if not (new_token_ids or self._end_is_new):
            return None
        delta = Delta(
            self._new_text, tuple(new_token_ids), self.finish_reason, tuple(self._new_scored)
        )
        self._new_text, self._new_scored = "", []
        self._num_taken = len(self.token_ids)
        self._end_is_new = False
        return delta

    def take_text(self) -> str | None:
        """Return the text alone of what `take` would, None if that would be nothing or an end."""
        if self._num_taken == len(self.token_ids) or self._end_is_new:
            return None
        text, self._new_text = self._new_text, ""
        self._num_taken = len(self.token_ids)
        return text

    def state(self) -> dict[str, Any]:
        """Return where it stands as plain data for people, without its tokens and its text."""
        return {
            "num_prompt_tokens": len(self.spec.prompt_token_ids),
            "num_cached_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_tokens,
            "max_tokens": self.spec.params.max_tokens,
            "priority": self.spec.priority,
        }

    def _show(self, text: str) -> None:
        self._num_decoded_chars += len(text)
        # Before min_tokens a stop string is text like any other, as in vLLM.
        may_stop = self.num_tokens > self.spec.params.min_tokens
        shown = self._stop_filter.push(text) if may_stop else text
        self._num_shown_chars += len(shown)
        self._new_text += shown

    def _release_scored(self, *, everything: bool = False) -> None:
        """Let go of what belongs to text that is shown; without stop strings, of everything."""
        everything |= not self._stop_filter.stops
        while self._held_scored and (
            everything or self._held_scored[0].text_offset < self._num_shown_chars
        ):
            self._new_scored.append(self._held_scored.pop(0))


class StreamGroup:
    """The streams of one HTTP request (choices, prompts), read as one.

    Its reader is a task that waits for `wake`. Beside it there may be a `shortcut`, that is called
    first when a step has brought tokens: it does what the task would, or else returns False. What
    it does costs no turn of the event loop.
    """

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.streams: list[RequestStream] = []
        self.shortcut: Callable[[], bool] | None = None
        self._is_nudged = False

    def tell(self) -> None:
        """Have the reader take what a step has brought."""
        if self.shortcut is None or not self.shortcut():
            self.wake.set()

    def nudge(self) -> None:
        """Have `news` yield once, whatever there is: a sign of life is wanted."""
        self._is_nudged = True
        self.wake.set()

    async def whole(self) -> list[Delta]:
        """Wait for the ends; return each stream as one delta. Raises the first stream's error."""
        self.shortcut = lambda: True  # ends wake
        while not all(stream.finish_reason is not None for stream in self.streams):
            await self.wake.wait()
            self.wake.clear()
            for stream in self.streams:
                if stream.error is not None:
                    raise stream.error
        deltas = [stream.take() for stream in self.streams]
        return [delta for delta in deltas if delta is not None]

    async def news(self) -> AsyncIterator[News]:
        """Yield what is new at a time, until all have ended. Raises the first stream's error.

        What comes of a step comes together. Only a nudge brings nothing.
        """
        open_streams = dict(enumerate(self.streams))
        while open_streams:
            await self.wake.wait()
            self.wake.clear()
            deltas: list[tuple[int, Delta]] = []
            error: RequestError | None = None
            for index, stream in list(open_streams.items()):
                error = error or stream.error
                delta = stream.take()
                if delta is not None:
                    deltas.append((index, delta))
                    if delta.finish_reason is not None:
                        del open_streams[index]
            if deltas or (self._is_nudged and error is None):
                self._is_nudged = False
                yield News(deltas, is_last=not open_streams)
            if error is not None:  # after what came before it
                raise error


class StreamTable(dict[RequestId, RequestStream]):
    """Every stream that has not ended, by request id."""

    def add(self, stream: RequestStream) -> None:
        self[stream.spec.request_id] = stream

    def remove(self, request_id: RequestId) -> None:
        self.pop(request_id, None)

    def state(self) -> dict[str, Any]:
        """Return every stream's state by request id."""
        return {request_id: stream.state() for request_id, stream in self.items()}

    def open_ids(self) -> list[RequestId]:
        return list(self)
