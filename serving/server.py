"""Runs one server from start to drained end: socket, model, instance, HTTP, signals."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType

import uvicorn

from engine.config import EngineConfig
from engine.startup import Progress
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import InstanceId
from serving.admin_server import admin_plane, watched_keys
from serving.admission import Admission
from serving.api.app import create_app
from serving.api.service import Service
from serving.api.watch import Watch
from serving.cluster.child import Child
from serving.cluster.driver import ClusterDriver
from serving.cluster.handle import InstanceHandle
from serving.cluster.process import ProcessHandle
from serving.cluster.supervisor import Supervisor
from serving.config import ServeConfig
from serving.connections import HangUp, set_options
from serving.errors import RequestError
from serving.http_connection import MAX_HEAD_BYTES, Connection
from serving.metrics import Metrics
from serving.ports import Port
from serving.status import report_status, watch_event_loop
from serving.text.chat import ChatTemplate, chat_template
from serving.text.tokenizer import TextCodec, fake_codec, load_codec

log = logging.getLogger(__name__)

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
    api: Port,
    admin: Port | None,
    child: Child,
    progress: Progress,
    on_ready: Callable[[Service], None],
) -> bool:
    """Serve until a signal, by `child` while it lives. True if all that was accepted ended well.

    Raises UserError when the model cannot be served.
    """
    codec = _codec(config)
    metrics = Metrics(config.engine.model_name)
    driver = ClusterDriver(
        ClusterScheduler(), codec, metrics, max_requests_per_instance=config.max_requests
    )
    template = chat_template(codec)

    def make_handle(incarnation: int) -> InstanceHandle:
        is_first = incarnation == 1
        return ProcessHandle(
            InstanceId("instance-0"),
            config.engine if is_first else _with_new_log(config.engine),
            watchdog_timeout_s=config.watchdog_timeout_s,
            child=child if is_first else None,
            progress=progress if is_first else None,
        )

    supervisor = Supervisor(driver, make_handle)
    warming = asyncio.ensure_future(_warm(template, codec))
    watchers = [
        asyncio.create_task(report_status(metrics)),
        asyncio.create_task(watch_event_loop(metrics.event_loop_lag)),
    ]
    try:
        service = Service(
            config=config,
            ready=await supervisor.start(),
            codec=codec,
            template=template,
            driver=driver,
            metrics=metrics,
            admission=Admission(config.admission),
            watch=Watch(config.watch_interval_s),
            started_at=int(time.time()),  # noqa: TID251 (shown to clients as wall-clock time)
        )
        return await _serve_http(service, api, admin, on_ready)
    finally:
        for watcher in watchers:
            watcher.cancel()
        await warming
        await supervisor.stop()
        await driver.stop()


async def _warm(template: ChatTemplate | None, codec: TextCodec) -> None:
    """Start what renders chats while the model loads. Completions need no good template."""
    try:
        if template is not None:
            await asyncio.to_thread(template.start)
            await asyncio.to_thread(codec.prepare)
    except RequestError as error:
        log.warning("chats cannot be served: %s", error.message)


async def _serve_http(
    service: Service, api: Port, admin: Port | None, on_ready: Callable[[Service], None]
) -> bool:
    gc.collect()
    gc.freeze()  # what exists now stays: walking it again and again would stop all streams
    set_options(api.listener, service.config.slow_client_timeout_s)
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
            HangUp(create_app(service, api.rules)),
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
        ),
        on_started=partial(on_ready, service),
        on_signal=partial(loop.call_soon_threadsafe, begin_drain),
    )
    admin_keys = None if admin is None else admin.rules.keys
    async with watched_keys(api.rules.keys, admin_keys), admin_plane(service, admin):
        await server.serve(sockets=[api.listener])
    return drained is not None and drained.done() and drained.result()


def _with_new_log(config: EngineConfig) -> EngineConfig:
    """Return the settings of a later incarnation: the log of the one that was lost is kept."""
    path = config.decision_log
    if path is None:
        return config
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return replace(config, decision_log=next(name for name in names if not name.exists()))


def _codec(config: ServeConfig) -> TextCodec:
    folder = config.engine.model_folder
    return fake_codec() if folder is None else load_codec(folder)
