"""Runs one server from start to drained end: socket, model, instance, HTTP, signals."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from engine.build import CannotStart, StartupTimes, build_engine
from engine.models.errors import ModelFormatError
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import InstanceId
from serving.admission import Admission
from serving.api.app import create_app
from serving.api.service import Service
from serving.api.watch import Watch
from serving.cluster.driver import ClusterDriver
from serving.cluster.inproc import InProcessHandle
from serving.config import ServeConfig
from serving.connections import HangUp, set_options
from serving.errors import UserError
from serving.metrics import Metrics
from serving.text.chat import ChatTemplate
from serving.text.tokenizer import TextCodec, fake_codec, load_codec

# After the drain only idle connections are left; uvicorn waits this long for them.
_CLOSE_TIMEOUT_S = 3
# Longer than clients keep idle connections (httpx 5 s, aiohttp 15 s): whoever closes one while the
# other sends on it fails that request, and clients know when they send.
_KEEP_ALIVE_S = 75


class _HttpServer(uvicorn.Server):
    """uvicorn leaves at the first signal; this one asks first. Both methods are its hooks."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_started: Callable[[], None],
        on_signal: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_signal = on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._on_signal()


async def serve(
    config: ServeConfig,
    listener: socket.socket,
    times: StartupTimes,
    on_ready: Callable[[Service], None],
) -> bool:
    """Serve until a signal. True if every accepted request ended by itself.

    Raises UserError when the model cannot be served.
    """
    codec = _codec(config)
    metrics = Metrics(config.engine.model_name)
    driver = ClusterDriver(
        ClusterScheduler(), codec, metrics, max_requests_per_instance=config.max_requests
    )
    build = partial(build_engine, config.engine, times)
    try:
        ready = await driver.start(InProcessHandle(InstanceId("instance-0"), build))
    except (ModelFormatError, CannotStart) as error:
        raise UserError(error.cause, error.remedy) from error
    service = Service(
        config=config,
        ready=ready,
        codec=codec,
        template=ChatTemplate(codec.template, codec.special_tokens) if codec.template else None,
        driver=driver,
        metrics=metrics,
        admission=Admission(config.admission),
        watch=Watch(config.watch_interval_s),
        started_at=int(time.time()),  # noqa: TID251 (shown to clients as wall-clock time)
    )
    try:
        return await _serve_http(service, listener, on_ready)
    finally:
        await driver.stop()


async def _serve_http(
    service: Service, listener: socket.socket, on_ready: Callable[[Service], None]
) -> bool:
    gc.collect()
    gc.freeze()  # what exists now stays: walking it again and again would stop all streams
    set_options(listener, service.config.slow_client_timeout_s)
    loop = asyncio.get_running_loop()
    drained: asyncio.Task[bool] | None = None

    async def drain() -> bool:
        try:
            return await service.driver.drain(service.config.drain_timeout_s)
        finally:
            server.should_exit = True

    def begin_drain() -> None:
        nonlocal drained
        if drained is None:
            drained = loop.create_task(drain())
        else:  # the second signal
            server.should_exit = server.force_exit = True

    server = _HttpServer(
        uvicorn.Config(
            HangUp(create_app(service)),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        ),
        on_started=partial(on_ready, service),
        on_signal=partial(loop.call_soon_threadsafe, begin_drain),
    )
    await server.serve(sockets=[listener])
    return drained is not None and drained.done() and drained.result()


def _codec(config: ServeConfig) -> TextCodec:
    folder = config.engine.model_folder
    return fake_codec() if folder is None else load_codec(folder)
