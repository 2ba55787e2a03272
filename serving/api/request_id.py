"""Every answer carries x-request-id: the client's own, or one made here; inside, always ours.

Stamps the arrival, too.
"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.headers import field

_HEADER, _FIELD = "x-request-id", b"x-request-id"
_MAX_CHARS = 128


class RequestIds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        given = field(scope, _FIELD)
        shown = given if given.isprintable() and 0 < len(given) <= _MAX_CHARS else request_id
        state = scope.setdefault("state", {})
        state["request_id"], state["shown_request_id"] = request_id, shown
        state["arrived_at_s"] = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = state["shown_request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


class TakenIds(NamedTuple):
    internal: str  # 128 random bits, so that two clients' equal ids never meet
    shown: str  # the client's own if it gave one, in the header or in the body
    arrived_at_s: float  # of time.monotonic(), when the head of the HTTP request was there


def take_request_id(request: Request, given: str | None) -> TakenIds:
    """Return the ids of a request; one given in the body wins, and goes into the header too."""
    state = request.scope["state"]
    if given is not None:
        state["shown_request_id"] = given
    return TakenIds(state["request_id"], state["shown_request_id"], state["arrived_at_s"])
