"""Server-sent events, framed as OpenAI's clients read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from serving.api.open_answer import KEEP_ALIVE, EventResponse, OpenAnswer
from serving.errors import RequestError, internal_error

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"


def event_stream(chunks: AsyncIterator[dict[str, Any] | None], answer: OpenAnswer) -> EventResponse:
    """Send each chunk as an event, None as a comment; at the end, `[DONE]`.

    An error on the way becomes the last event; one before the first is raised.
    """

    async def frames() -> AsyncIterator[bytes]:
        is_first = True
        try:
            async for chunk in chunks:
                yield KEEP_ALIVE if chunk is None else event(chunk)
                is_first = False
        except RequestError as error:
            if is_first:
                raise
            yield event(error.body())
        except Exception:
            if is_first:
                raise
            # The status is sent: an end without an error would look like success.
            log.exception("a stream failed inside the server")
            yield event(internal_error().body())
        yield DONE

    return EventResponse(frames(), answer)
