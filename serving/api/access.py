"""Counts every HTTP answer, and writes its line in the log.

At info, a line for every request is what people switch off first, and under overload it is a flood:
the status line tells the rates. So a line is at debug, and at warning where the server failed. It
names the route's template, never the path or the query, which are the client's words.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.logs import event

log = logging.getLogger(__name__)

NO_ROUTE = "none"
CLIENT_GONE = 499  # nginx's code for it
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Access:
    """ASGI middleware, outermost: it sees what every other one answers."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, int], None]) -> None:
        self._app = app
        self._observe = observe
        self._paths: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()
        status, shown_id = CLIENT_GONE, ""

        async def watch(message: Message) -> None:
            nonlocal status, shown_id
            if message["type"] == "http.response.start":
                status = message["status"]
                shown_id = Headers(raw=message["headers"]).get("x-request-id", "")
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = 500
            raise
        finally:
            route = self._route(scope)
            self._observe(route, status)
            _write(scope, route, status, shown_id, time.monotonic() - start_s)

    def _route(self, scope: Scope) -> str:
        """Return the template of the route; a path without parameters is its own.

        By the second many are known that were refused before anybody looked for their route.
        """
        if (route := scope.get("route")) is not None:
            return str(route.path)
        if self._paths is None:
            self._paths = frozenset(route.path for route in scope["app"].routes)
        return scope["path"] if scope["path"] in self._paths else NO_ROUTE


def _write(scope: Scope, route: str, status: int, shown_id: str, duration_s: float) -> None:
    level = logging.WARNING if status in (500, 501, 502) else logging.DEBUG
    if log.isEnabledFor(level):
        request_id = scope.get("state", {}).get("request_id")
        event(
            log,
            level,
            "answered",
            request_id=request_id,
            client_request_id=shown_id if shown_id != request_id else None,
            method=scope["method"] if scope["method"] in _METHODS else "OTHER",
            route=route,
            status=status,
            duration_s=round(duration_s, 6),
        )
