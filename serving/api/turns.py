"""Routes that compute beside the model: one request at a time, so that generation is not slowed."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.responses import json_response
from serving.errors import Unavailable

_MAX_WAITING = 64  # each holds a body


class Turns:
    """Shared by the routes that take turns; `of` wraps the application of each."""

    def __init__(self, max_num_waiting: int = _MAX_WAITING) -> None:
        self._turn = asyncio.Lock()
        self._num_free = max_num_waiting + 1

    def of(self, app: ASGIApp) -> ASGIApp:
        async def take_turn(scope: Scope, receive: Receive, send: Send) -> None:
            if not self._num_free:
                error = Unavailable("too many wait for the tokenizer", code="queue_full")
                await json_response(error.body(), error.status, error.headers())(
                    scope, receive, send
                )
                return
            self._num_free -= 1
            try:
                async with self._turn:
                    await app(scope, receive, send)
            finally:
                self._num_free += 1

        return take_turn
