"""Server-sent events, framed as OpenAI's clients read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.errors import RequestError, internal_error

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_encoder = msgspec.json.Encoder()


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"


def event_stream(
    chunks: AsyncIterator[dict[str, Any]], on_close: Callable[[], None]
) -> StreamingResponse:
    """Send each chunk as an event; an error on the way becomes the last one, then `[DONE]`.

    `on_close` is called once when the response is over, however it ended.
    """

    async def frames() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield event(chunk)
        except RequestError as error:
            yield event(error.body())
        except Exception:  # the status is sent: an end without an error would look like success
            log.exception("a stream failed inside the server")
            yield event(internal_error().body())
        yield DONE

    return _EventStream(frames(), on_close)


class _EventStream(StreamingResponse):
    """A generator that never started runs no `finally`; a response that is called always ends."""

    def __init__(self, frames: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=_HEADERS)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
