"""Server-sent events, framed as OpenAI's clients read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
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


# In a chunk, where text is to stand: a byte that JSON does not have.
TEXT: Any = msgspec.Raw(b"\0")


def text_events(
    chunk: dict[str, Any], take: Callable[[], str | None]
) -> Callable[[], bytes | None]:
    """Return what makes an event of the chunk and the text that `take` returns, unless it is None.

    All but the text is encoded here, once.
    """
    before, after = event(chunk).split(bytes(TEXT))
    encode = _encoder.encode

    def next_event() -> bytes | None:
        text = take()
        return None if text is None else before + encode(text) + after

    return next_event


def event_stream(
    parts: AsyncIterator[Chunks],
    answer: OpenAnswer,
    texts: Callable[[], bytes | None] | None = None,
) -> EventResponse:
    """Send each chunk as an event; behind the last, `[DONE]`.

    An error on the way becomes the last event; one before the first is raised. What is text alone
    may go past all this, as `texts` has it.
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

    return EventResponse(frames(), answer, texts)
