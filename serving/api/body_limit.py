"""Bodies larger than the limit are refused, whether they declare their size or not."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.responses import json_response
from serving.errors import BodyTooLarge


class BodyLimit:
    """ASGI middleware. Reads the body before the application does, up to the limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                error = BodyTooLarge(f"the body must not exceed {self._max_bytes} bytes")
                headers = error.headers() | {"connection": "close"}
                await json_response(error.body(), error.status, headers)(scope, receive, send)
                return
        scope.setdefault("state", {})["num_body_bytes"] = len(body)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)
