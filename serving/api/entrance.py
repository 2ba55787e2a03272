"""What stands at the port from the first second: "still loading", until there is an application.

A server that refuses connections while it loads looks like one that is gone. It owns no route.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.admission import jittered
from serving.api.refusal import refuse
from serving.api.request_id import RequestIds
from serving.api.watch import Clock
from serving.errors import Unavailable
from serving.telemetry.table import LOADING

_MAX_RETRY_S = 30.0


class Entrance:
    """ASGI application: every request gets 503 until `open`, and then goes to what was opened."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began_at_s = clock()
        self._app: ASGIApp = RequestIds(self._still_loading)

    def open(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _still_loading(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Nobody knows how long it takes: as long again as it has so far is never far off.
            so_far_s = self._clock() - self._began_at_s
            error = Unavailable(
                "the model is still loading",
                code=LOADING,
                retry_after_s=jittered(
                    min(max(so_far_s, 1.0), _MAX_RETRY_S), scope["state"]["request_id"]
                ),
            )
            await refuse(error, scope, receive, send)
