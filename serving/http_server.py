"""uvicorn as Hocket runs it: one port, with an entrance that answers from the first second."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from serving.api.entrance import Entrance
from serving.connections import HangUp
from serving.http_connection import MAX_HEAD_BYTES, Connection
from serving.ports import Port

# What is accepted ends before the server does; after it only idle connections are left.
_CLOSE_TIMEOUT_S = 3
# Longer than clients keep idle connections (httpx 5 s, aiohttp 15 s): whoever closes one while the
# other sends on it fails that request, and clients know when they send.
_KEEP_ALIVE_S = 75


class HttpServer(uvicorn.Server):
    """uvicorn without its signals: whoever runs it knows when to leave."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.entrance = Entrance()
        super().__init__(
            uvicorn.Config(
                HangUp(self.entrance),
                http=Connection,
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_config=None,  # its messages go where ours go
                log_level="error",  # at "warning" everybody who connects can fill the log
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            )
        )

    @contextlib.asynccontextmanager
    async def running(self, on_end: Callable[[], None]) -> AsyncIterator[None]:
        """Answer while the block runs; `on_end` is called if that ends before the block does."""
        task = asyncio.create_task(self.serve(sockets=[self.port.listener]))
        task.add_done_callback(lambda _: on_end())
        try:
            yield
        finally:
            self.should_exit = True
            await task

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing; a hook of uvicorn."""
        yield
