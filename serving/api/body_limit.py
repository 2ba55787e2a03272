"""Bodies are bounded in size and in time, whether they declare their size or not, and in sum."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.headers import field
from serving.api.refusal import refuse
from serving.errors import BodyTooLarge, RequestTimedOut, Unavailable

# Most bodies: they pass, whatever others withhold.
_SMALL_BYTES = 64 << 10


class BodyLimit:
    """ASGI middleware. Reads the body before the application does, up to the limits.

    `max_total_bytes` is of all bodies that are not complete: many clients who withhold their last
    byte must not fill the memory.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_total_bytes: int, timeout_s: float
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._num_free_bytes = max_total_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_declared(scope)
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except (BodyTooLarge, Unavailable) as error:
            await refuse(error, scope, receive, send)
            return
        except TimeoutError:
            late = RequestTimedOut(f"the body did not arrive within {self._timeout_s:g} s")
            await refuse(late, scope, receive, send)
            return
        if body is None:
            return  # the client is gone
        scope.setdefault("state", {})["num_body_bytes"] = len(body)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    def _check_declared(self, scope: Scope) -> None:
        declared = field(scope, b"content-length")
        # The HTTP parser lets only digits through, at most 20 of them.
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, None if the client left. Raises BodyTooLarge, Unavailable."""
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                part = message.get("body", b"")
                body += part
                self._num_free_bytes -= len(part)
                if len(body) > self._max_bytes:
                    raise self._too_large()
                if not message.get("more_body", False):
                    return bytes(body)
                if self._num_free_bytes < 0 and len(body) > _SMALL_BYTES:
                    raise Unavailable("too many bodies are on their way", code="queue_full")
        finally:
            self._num_free_bytes += len(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body must not exceed {self._max_bytes} bytes")
