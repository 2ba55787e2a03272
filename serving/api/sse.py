"""Server-sent events, framed as OpenAI's clients read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec

from serving.api.open_answer import KEEP_ALIVE, EventResponse, Frame, OpenAnswer
from serving.errors import RequestError, internal_error

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"


class Chunks(NamedTuple):
    """What is to be sent at once; nothing but a comment, a sign of life, if it is empty."""

    values: list[dict[str, Any]]
    is_last: bool


def event_stream(parts: AsyncIterator[Chunks], answer: OpenAnswer) -> EventResponse:
    """Send each chunk as an event; behind the last, `[DONE]`.

    An error on the way becomes the last event; one before the first is raised.
    """

    async def frames() -> AsyncIterator[Frame]:
        is_first = True
        try:
            async for values, is_last in parts:
                data = b"".join(map(event, values)) if values else KEEP_ALIVE
                yield Frame(data + DONE if is_last else data, is_last)
                is_first = False
        except RequestError as error:
            if is_first:
                raise
            yield Frame(event(error.body()) + DONE, is_last=True)
        except Exception:
            if is_first:
                raise
            # The status is sent: an end without an error would look like success.
            log.exception("a stream failed inside the server")
            yield Frame(event(internal_error().body()) + DONE, is_last=True)

    return EventResponse(frames(), answer)
