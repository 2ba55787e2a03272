"""uvicorn as Hocket runs it: one port, with an entrance that answers from the first second."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType

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
    """uvicorn leaves at the first signal; this one asks `on_signal`, or leaves signals alone."""

    def __init__(self, port: Port, on_signal: Callable[[], object] | None = None) -> None:
        self.port = port
        self.entrance = Entrance()
        self._on_signal = on_signal
        self._was_asked_to_end = False
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
        """A hook of uvicorn."""
        if self._on_signal is None:
            yield
            return
        with super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal: a hook of uvicorn, called wherever the main thread happens to be."""
        assert self._on_signal is not None
        self.force_exit = self._was_asked_to_end  # asked twice, it waits for nobody
        self._was_asked_to_end = True
        self._on_signal()
