"""What no handler knows: a fault of the server. The client is told so, and the log why, once.

FastAPI's own place for this is outside of every other middleware, where answers get no request id,
and it raises again what it has answered.
"""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.api.responses import json_response
from serving.errors import internal_error

log = logging.getLogger(__name__)


class Faults:
    """ASGI middleware; an answer that has begun can only break off, which uvicorn does and logs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watch(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            request_id = scope["state"]["request_id"]
            logs.failure(log, "a request failed inside the server", error, request_id=request_id)
            refusal = internal_error()
            await json_response(refusal.body(), refusal.status)(scope, receive, send)
