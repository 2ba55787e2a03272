"""What the kernel keeps of a client that does not read, and what a request may do past ASGI.

Owns socket options and the way from a request to its connection. Decides about nobody.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

# Bytes of a stream that wait in the kernel to be sent; beyond it they wait here, and coalesce.
_MAX_UNSENT_BYTES = 64 << 10
_LONGEST_TIMEOUT_S = 2_000_000  # in milliseconds it must be a C int


def set_options(listener: socket.socket, timeout_s: float) -> None:
    """Bound what its connections hold for a client that reads nothing, and for how long.

    Where the system has no such option, the bounds of this process remain.
    """
    options = {
        "TCP_NOTSENT_LOWAT": _MAX_UNSENT_BYTES,
        # Also ends connections whose last bytes nobody takes, when no request knows of them.
        "TCP_USER_TIMEOUT": max(1, round(min(timeout_s, _LONGEST_TIMEOUT_S) * 1000)),
    }
    for name, value in options.items():
        with contextlib.suppress(AttributeError, OSError):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Link:
    """The connection of one request: what ASGI has no word for, or takes too long to say."""

    def __init__(self, cycle: Any) -> None:
        """`cycle` is uvicorn's, of one request and its answer."""
        self._cycle = cycle

    def write(self, take: Callable[[], bytes | None]) -> bool:
        """Write what `take` returns of an answer whose head has gone, as `send` would.

        False if it returns None; or it was not called, as the client does not keep up, or its
        answer is not in chunks.
        """
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        data = take()
        if data is None:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def hang_up(self) -> None:
        self._cycle.transport.abort()


class Links:
    """ASGI middleware, the outermost: `link` of a request's state is its connection.

    uvicorn's `send` belongs to an object that has the transport. Under another server, and for
    clients before HTTP/1.1, there is no `link`: what a slow client loses is its request alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if hasattr(cycle, "transport"):
            scope.setdefault("state", {})["link"] = Link(cycle)
        await self._app(scope, receive, send)
