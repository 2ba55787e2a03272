"""What the kernel keeps of a client that does not read, and how to be rid of it.

Owns socket options and the way from a request to its connection. Decides about nobody.
"""

from __future__ import annotations

import contextlib
import socket

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


class HangUp:
    """ASGI middleware, the outermost: `hang_up` of a request's state closes its connection.

    ASGI has no word for it. uvicorn's `send` belongs to an object that has the transport; under
    another server there is no `hang_up`, and a slow client loses its request alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        if transport is not None:
            scope.setdefault("state", {})["hang_up"] = transport.abort
        await self._app(scope, receive, send)
