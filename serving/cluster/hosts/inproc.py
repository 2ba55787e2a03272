"""An instance in this process: its loop has a thread of its own, and messages cross by queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from threading import Thread

from engine.core import EngineCore
from engine.messages import Command, Ready, Report, Stop
from engine.models.errors import ModelFormatError
from engine.startup import CannotStart
from scheduler.types import InstanceId
from serving.cluster.handle import ended_while_starting, one_line
from serving.cluster.hosts import wire
from serving.errors import UserError

# Makes the loop, on the thread where it will run, given where it shall report.
EngineFactory = Callable[[Callable[[Report], None]], tuple[EngineCore, Ready]]


class InProcessHandle:
    """See `serving.cluster.handle`. `through_wire` encodes and decodes every message, as a socket
    would, so that tests of this handle are tests of the wire as well.
    """

    def __init__(
        self, instance_id: InstanceId, build: EngineFactory, *, through_wire: bool = False
    ) -> None:
        self.instance_id = instance_id
        self._build = build
        self._through_wire = through_wire
        self._core: EngineCore | None = None
        self._thread: Thread | None = None
        self._started: asyncio.Future[Ready] | None = None
        self._is_stopped = False

    async def start(self, on_report: Callable[[Report], None]) -> Ready:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[Ready] = loop.create_future()
        self._started = started

        def emit(report: Report) -> None:
            if self._through_wire:
                report = wire.decode_report(wire.encode(report))
            _call_soon(loop, partial(on_report, report))

        def begin() -> None:
            ready, refusal = None, None
            try:
                self._core, ready = self._build(emit)
            except (ModelFormatError, CannotStart) as error:
                refusal = UserError(error.cause, error.remedy)
            except Exception as error:  # noqa: BLE001 (it is told where start() is awaited)
                refusal = ended_while_starting(one_line(f"{type(error).__name__}: {error}"))
                refusal.__cause__ = error
            _call_soon(loop, partial(_settle, started, ready, refusal))

        self._thread = Thread(
            target=self._run, args=(begin,), name=f"engine-{self.instance_id}", daemon=True
        )
        self._thread.start()
        return await started

    def send(self, command: Command) -> None:
        if self._through_wire:
            command = wire.decode_command(wire.encode(command))
        if self._core is not None:
            self._core.inbox.put(command)

    async def stop(self) -> None:
        if self._thread is not None:
            self._is_stopped = True
            self.send(Stop())
            if self._started is not None:
                self._started.cancel()
            await asyncio.to_thread(self._thread.join)

    def _run(self, begin: Callable[[], None]) -> None:
        begin()
        if self._core is not None:
            if self._is_stopped:  # while it was being made, so that the inbox was not there
                self._core.inbox.put(Stop())
            with contextlib.suppress(Exception):  # the loop has reported it as Failed
                self._core.run()


def _settle(started: asyncio.Future[Ready], ready: Ready | None, refusal: UserError | None) -> None:
    """Tell who waits in start() how it went, unless nobody does any more."""
    if started.done():
        return
    if ready is not None:
        started.set_result(ready)
    elif refusal is not None:
        started.set_exception(refusal)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Run `call` on the loop; a loop that has ended has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
