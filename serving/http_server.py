"""uvicorn as Hocket runs it: one port, with an entrance that answers from the first second."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn

from serving import logs
from serving.api.entrance import Entrance
from serving.connections import Links
from serving.http_connection import ACCEPTS_AT_ONCE, Connection
from serving.ports import Port

log = logging.getLogger(__name__)

# Those that have connected and are not accepted yet wait in the kernel, up to its own limit.
_LONGEST_QUEUE = 2048
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_LINES_S = 1.0  # between lines that say so
# What is accepted ends before the server does; after it only idle connections are left.
_CLOSE_TIMEOUT_S = 3
_HANG_UP_S = 1.0  # for what answers to see that nobody reads it any more
# Longer than clients keep idle connections (httpx 5 s, aiohttp 15 s): whoever closes one while the
# other sends on it fails that request, and clients know when they send.
_KEEP_ALIVE_S = 75


class HttpServer(uvicorn.Server):
    """uvicorn without its signals: whoever runs it knows when to leave."""

    def __init__(self, port: Port, protocol: type[Connection] = Connection) -> None:
        self.port = port
        self.entrance = Entrance()
        super().__init__(
            uvicorn.Config(
                Links(self.entrance),
                http=protocol,
                ws="none",
                backlog=ACCEPTS_AT_ONCE,  # which is all that asyncio does with it but for `listen`
                log_config=None,  # its messages go where ours go
                log_level="error",  # at "warning" everybody who connects can fill the log
                access_log=False,
                proxy_headers=False,  # nobody asks for a client's address
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            )
        )

    @contextlib.asynccontextmanager
    async def running(self, on_end: Callable[[], None]) -> AsyncIterator[None]:
        """Answer while the block runs; `on_end` is called if that ends before the block does."""
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(AcceptFailures())
        task = asyncio.create_task(self.serve(sockets=[self.port.listener]))
        task.add_done_callback(lambda _: on_end())
        try:
            yield
        finally:
            self.should_exit = True
            await task
            await self._hang_up()

    async def _hang_up(self) -> None:
        """End what still answers by its connection: cancelled with the loop it is a fault."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_HANG_UP_S)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """A hook of uvicorn."""
        await super().startup(sockets=sockets)
        self.port.listener.listen(_LONGEST_QUEUE)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing; a hook of uvicorn."""
        yield


class AcceptFailures:
    """Handler of what goes wrong on the event loop: clients without room are a line a second.

    asyncio would say it for each, with all that the log has of a fault.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at_s = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _LACKS and "socket" in context):
            loop.default_exception_handler(context)
            return
        now = self._clock()
        if now - self._said_at_s >= _ACCEPT_LINES_S:
            self._said_at_s = now
            logs.event(log, logging.ERROR, "clients cannot be accepted", cause=error.strerror)
