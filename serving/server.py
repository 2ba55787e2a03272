"""Runs one server from start to drained end: ports, model, instances, signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from engine.messages import Ready
from engine.startup import Progress
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.config import ClusterConfig
from scheduler.instance.batching import rank_policy
from scheduler.types import InstanceId
from serving.admission import Admission
from serving.api.admin import create_admin_app
from serving.api.app import create_app
from serving.api.service import Service
from serving.api.watch import Watch
from serving.cluster.backend import Backend
from serving.cluster.driver import ClusterDriver
from serving.cluster.fleet import Fleet
from serving.cluster.members import Members
from serving.config import ServeConfig
from serving.connections import set_options
from serving.errors import RequestError
from serving.http_connection import FewConnections
from serving.http_server import HttpServer
from serving.keys import watched
from serving.metrics import Metrics
from serving.ports import Port
from serving.status import report_status, watch_event_loop
from serving.text.chat import ChatTemplate, chat_template
from serving.text.tokenizer import TextCodec, fake_codec, load_codec

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def serve(
    config: ServeConfig,
    api: Port,
    admin: Port | None,
    backend: Backend,
    progress: Progress,
    on_ready: Callable[[Service, Mapping[InstanceId, Ready]], None],
) -> bool:
    """Serve until a signal. True if all that was accepted ended well.

    Raises UserError when the model cannot be served.
    """
    codec = _codec(config)
    metrics = Metrics(config.engine.model_name)
    admission = Admission(config.admission)
    driver = ClusterDriver(
        ClusterScheduler(
            ClusterConfig(
                dispatch=config.dispatch,
                priority_headroom_tokens=config.priority_headroom_tokens,
                prefix_affinity=config.prefix_affinity,
                prefix_caching=config.engine.prefix_caching,
                max_num_waiting=config.admission.max_num_waiting,
                continuation_timeout_s=config.continuation_timeout_s,
            ),
            rank=rank_policy(config.engine.policy),
        ),
        codec,
        metrics,
        retry_after_s=lambda request_id: admission.retry_after_s(request_id, time.monotonic()),
    )
    template = chat_template(codec)

    def bound(numbers: Sequence[int]) -> None:
        admission.limits = config.admission_of(numbers)

    fleet = Fleet(
        driver,
        Members(driver, backend.handle, drain_timeout_s=config.drain_timeout_s),
        config.num_instances,
        max_num_instances=backend.max_num_instances,
        on_numbers=bound,
        progress=progress,
    )
    starting = asyncio.ensure_future(_start(backend, fleet))
    set_options(api.listener, config.slow_client_timeout_s)
    api_server = HttpServer(api)
    admin_server = None if admin is None else HttpServer(admin, FewConnections)
    servers = [server for server in (api_server, admin_server) if server is not None]
    ending = _Ending(driver, config.drain_timeout_s, starting, servers)
    warming = asyncio.ensure_future(_warm(template, codec))
    watchers = [
        asyncio.create_task(report_status(metrics)),
        asyncio.create_task(watch_event_loop(metrics.event_loop_lag)),
    ]
    ending.obey_signals()
    try:
        async with contextlib.AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.running(ending.server_ended))
            await asyncio.wait([starting])
            if starting.cancelled():  # by a signal: nothing had been accepted
                return True
            service = Service(
                config=config,
                ready=starting.result(),
                codec=codec,
                template=template,
                driver=driver,
                metrics=metrics,
                admission=admission,
                watch=Watch(config.watch_interval_s),
                started_at=int(time.time()),  # noqa: TID251 (shown to clients as wall-clock time)
            )
            api_server.entrance.open(create_app(service, api.rules))
            stores = [api.rules.keys]
            if admin is not None and admin_server is not None:
                app = create_admin_app(service, fleet, admin.rules, backend.facts())
                admin_server.entrance.open(app)
                stores.append(admin.rules.keys)
            await stack.enter_async_context(watched(*stores))
            gc.collect()
            gc.freeze()  # what exists now stays: walking it again would stop all streams
            on_ready(service, fleet.readies())
            return await ending.clean
    finally:
        for task in (starting, *watchers):
            task.cancel()
        await warming
        await fleet.stop()
        await driver.stop()
        await backend.stop()
        ending.disobey_signals()


async def _start(backend: Backend, fleet: Fleet) -> Ready:
    await backend.start()
    return await fleet.start()


class _Ending:
    """What signals ask for: the first, an end to the start or a drain; the second, an end at once.

    `clean` tells whether all that was accepted ended well, once it is over.
    """

    def __init__(
        self,
        driver: ClusterDriver,
        drain_timeout_s: float,
        starting: asyncio.Future[Ready],
        servers: Sequence[HttpServer],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.clean: asyncio.Future[bool] = self._loop.create_future()
        self._driver = driver
        self._drain_timeout_s = drain_timeout_s
        self._starting = starting
        self._servers = servers
        self._draining: asyncio.Task[None] | None = None

    def obey_signals(self) -> None:
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._next)

    def disobey_signals(self) -> None:
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)

    def server_ended(self) -> None:
        """The API cannot be reached any more, for whatever reason."""
        self._end(clean=False)

    def _next(self) -> None:
        if not self._starting.done():
            self._starting.cancel()
        elif self._draining is None:
            self._draining = self._loop.create_task(self._drain())
        else:
            for server in self._servers:
                server.force_exit = True  # it waits for no connection any more
            self._end(clean=False)

    async def _drain(self) -> None:
        self._end(clean=await self._driver.drain(self._drain_timeout_s))

    def _end(self, *, clean: bool) -> None:
        if not self.clean.done():
            self.clean.set_result(clean)


async def _warm(template: ChatTemplate | None, codec: TextCodec) -> None:
    """Start what renders chats while the model loads. Completions need no good template."""
    try:
        if template is not None:
            await asyncio.to_thread(template.start)
            await asyncio.to_thread(codec.prepare)
    except RequestError as error:
        log.warning("chats cannot be served: %s", error.message)


def _codec(config: ServeConfig) -> TextCodec:
    folder = config.engine.model_folder
    return fake_codec() if folder is None else load_codec(folder)
