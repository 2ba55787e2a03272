"""What runs beside the API's port: the operators' port, and the watch over files of keys."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator

import uvicorn

from serving.api.admin import create_admin_app
from serving.api.service import Service
from serving.http_connection import MAX_HEAD_BYTES, Connection
from serving.keys import KeyStore
from serving.ports import Port

_CLOSE_TIMEOUT_S = 1


class _Server(uvicorn.Server):
    """Signals belong to the API's server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def admin_plane(service: Service, port: Port | None) -> AsyncIterator[None]:
    """Serve operators while the block runs, if there is a port for them."""
    if port is None:
        yield
        return
    server = _Server(
        uvicorn.Config(
            create_admin_app(service, port.rules),
            http=Connection,
            ws="none",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[port.listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def watched_keys(*stores: KeyStore | None) -> AsyncIterator[None]:
    """Read files of keys again when they change, and at SIGHUP."""
    loop = asyncio.get_running_loop()
    files = [store for store in stores if store is not None and store.reloads]
    if not files:
        yield
        return

    def reload() -> None:
        for store in files:
            store.reload()

    loop.add_signal_handler(signal.SIGHUP, reload)
    watches = [loop.create_task(store.watch()) for store in files]
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for watch in watches:
            watch.cancel()
