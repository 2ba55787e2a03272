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
from serving.cluster import wire
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

    async def start(self, on_report: Callable[[Report], None]) -> Ready:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[Ready] = loop.create_future()

        def emit(report: Report) -> None:
            if self._through_wire:
                report = wire.decode_report(wire.encode(report))
            _call_soon(loop, partial(on_report, report))

        def begin() -> None:
            try:
                self._core, ready = self._build(emit)
            except (ModelFormatError, CannotStart) as error:
                refusal = UserError(error.cause, error.remedy)
                _call_soon(loop, partial(started.set_exception, refusal))
            except Exception as error:  # noqa: BLE001 (it is raised where start() is awaited)
                _call_soon(loop, partial(started.set_exception, error))
            else:
                _call_soon(loop, partial(started.set_result, ready))

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
            self.send(Stop())
            await asyncio.to_thread(self._thread.join)

    def _run(self, begin: Callable[[], None]) -> None:
        begin()
        if self._core is not None:
            with contextlib.suppress(Exception):  # the loop has reported it as Failed
                self._core.run()


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Run `call` on the loop; a loop that has ended has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
