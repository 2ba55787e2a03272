"""An instance in a process of its own, behind a socket: one connection is one incarnation.

End of file is its death, and so is the kernel's word that the process is gone, garbage, unread
commands and work owed without a step. Whatever the way, the process is gone before `Failed` is
reported, and nothing follows. Where the process runs, and how it is reached, is its host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import msgspec

from engine.faults import cause_of, detail_of
from engine.messages import (
    CannotStart,
    Command,
    Failed,
    Inspected,
    PhaseAdvanced,
    PhaseBegun,
    Ping,
    Pong,
    Ready,
    Report,
    StartReport,
    StepEvents,
    Stop,
    Submit,
)
from engine.startup import Progress
from scheduler.types import InstanceId
from serving.cluster.handle import ended_while_starting, one_line
from serving.cluster.hosts import wire
from serving.cluster.hosts.frames import FrameDecoder, FrameError, frame
from serving.cluster.hosts.host import Host
from serving.cluster.hosts.output import OutputRelay
from serving.cluster.hosts.received import Received
from serving.cluster.hosts.watchdog import Watchdog
from serving.errors import UserError
from serving.progress import NoProgress

log = logging.getLogger(__name__)

# Commands are small beside what one instance may be given at a time (prompts within the body
# limit): so much unread means that nobody reads.
_MAX_UNREAD_BYTES = 128 << 20
_END_GRACE_S = 1.0  # for a process that is to end by itself, to finish its step
_KILL_GRACE_S = 2.0  # for the kernel to take down one that it was told to kill
_DUMP_S = 0.2  # for a stuck process to write where it is
_OUTPUT_GRACE_S = 0.2  # for its last words
_EOF_GRACE_S = 0.1  # from its exit to the end of what it sent, all of which is there
_POLL_S = 0.005


class ProcessHandle:
    """See `serving.cluster.handle`. Belongs to the event loop."""

    def __init__(
        self,
        instance_id: InstanceId,
        host: Host,
        *,
        watchdog_timeout_s: float = 30.0,
        startup_timeout_s: float = 600.0,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.instance_id = instance_id
        self._host = host
        self._startup_timeout_s = startup_timeout_s
        self._progress = progress or NoProgress()
        self._clock = clock
        self._watchdog = Watchdog(watchdog_timeout_s)
        self._decoder = FrameDecoder()
        self._output = OutputRelay(instance_id)
        self._commands: asyncio.WriteTransport | None = None  # while they are taken
        self._on_report: Callable[[Report], None] = lambda _: None
        self._opening: asyncio.Task[asyncio.WriteTransport] | None = None
        self._started: asyncio.Future[Ready] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._heard_at_s = 0.0
        self._ending: asyncio.Task[None] | None = None  # when this is set, all is over

    @property
    def pid(self) -> int | None:
        """Of its process, once there is one."""
        return self._host.pid

    @property
    def node(self) -> str | None:
        """The address of its machine, if that may be another than this one."""
        return self._host.node

    async def start(self, on_report: Callable[[Report], None]) -> Ready:
        loop = asyncio.get_running_loop()
        self._on_report = on_report
        self._started = loop.create_future()
        received = Received(self._on_data, self._on_closed)
        self._opening = loop.create_task(self._host.open(received, self._output, self._on_exit))
        try:
            connection = await self._opening
        except UserError:
            self._host.close()
            raise
        self._heard_at_s = self._clock()
        self._watching = loop.create_task(self._watch(self._started))
        ready = await self._started
        if self._ending is None:
            self._commands = connection
        return ready

    def send(self, command: Command) -> None:
        if self._commands is None:
            return
        if isinstance(command, Submit):
            self._watchdog.submitted(command.spec.request_id, self._clock())
        self._commands.write(frame(wire.encode(command)))
        num_unread_bytes = self._commands.get_write_buffer_size()
        if num_unread_bytes > _MAX_UNREAD_BYTES:
            self._end(_End(f"it left {num_unread_bytes:,} bytes of commands unread"))

    async def stop(self) -> None:
        if self._started is None or self._opening is None:  # it never began
            return
        if self._ending is None:
            is_serving = self._commands is not None
            self.send(Stop())
            self._commands = None
            self._opening.cancel()
            self._started.cancel()
            grace_s = _END_GRACE_S if is_serving else 0.0
            self._ending = asyncio.get_running_loop().create_task(self._take_down(grace_s))
        await asyncio.shield(self._ending)

    # --- what comes from the process ---

    def _on_data(self, data: bytes) -> None:
        try:
            for payload in self._decoder.feed(data):
                if self._ending is not None:
                    return
                self._on_message(wire.decode_any_report(payload))
        except (FrameError, msgspec.DecodeError) as error:
            what = str(error) if isinstance(error, FrameError) else cause_of(error)
            self._end(_End(f"it sent what is no message: {what}", trace=detail_of(error)))
        except Exception as error:  # noqa: BLE001 (whoever took the report is at odds with it)
            what = f"its report could not be handled: {cause_of(error)}"
            self._end(_End(what, trace=detail_of(error)))

    def _on_message(self, message: Report | StartReport) -> None:
        assert self._started is not None
        self._heard_at_s = self._clock()
        match message:
            case StepEvents():
                self._watchdog.progressed(message, self._heard_at_s)
                self._on_report(message)
            case Pong():
                self._watchdog.answered(self._heard_at_s)
            case Inspected():
                self._on_report(message)
            case Failed(cause, trace):
                self._end(_End(cause, trace=trace, grace_s=_END_GRACE_S))
            case PhaseBegun(title, total):
                self._progress.phase(title, total)
            case PhaseAdvanced(done):
                self._progress.advance(done)
            case CannotStart(cause, remedy):
                self._end(_End(cause, remedy, grace_s=_END_GRACE_S))
            case Ready():
                if not self._started.done():
                    self._started.set_result(message)
            case _:
                assert_never(message)

    def _on_closed(self) -> None:
        self._end(_End(grace_s=_END_GRACE_S))

    def _on_exit(self) -> None:
        # The end of the connection usually comes with it, behind what it may have reported last.
        asyncio.get_running_loop().call_later(_EOF_GRACE_S, self._on_closed)

    async def _watch(self, started: asyncio.Future[Ready]) -> None:
        while self._ending is None:
            await asyncio.sleep(self._watchdog.interval_s)
            now = self._clock()
            wrong = self._watchdog.verdict(now)
            if not started.done() and now - self._heard_at_s > self._startup_timeout_s:
                wrong = f"it said nothing for {self._startup_timeout_s:g} s while it started"
            if wrong is not None:
                self._end(_End(wrong, is_stuck=True))
            elif self._commands is not None and self._watchdog.wants_ping(now):
                self.send(Ping())

    # --- its end ---

    def _end(self, end: _End) -> None:
        """Take the process down and report why; the first call counts."""
        if self._ending is None:
            self._commands = None
            self._ending = asyncio.get_running_loop().create_task(self._bury(end))

    async def _bury(self, end: _End) -> None:
        assert self._started is not None
        if end.is_stuck:
            self._host.dump()
            await asyncio.sleep(_DUMP_S)
        await self._take_down(end.grace_s)
        cause = one_line(end.cause or self._host.how_it_ended(self._output.last_line))
        if self._started.cancelled():  # nobody waits for it any more
            return
        if self._started.done():
            self._on_report(Failed(cause, end.trace))
        elif end.remedy:
            self._started.set_exception(UserError(cause, end.remedy))
        else:
            log.debug("%s ended while it started:\n%s", self.instance_id, end.trace)
            self._started.set_exception(ended_while_starting(cause))

    async def _take_down(self, grace_s: float) -> None:
        """Return when the process is gone and what it printed was read; close what was ours."""
        if not await self._is_gone_within(grace_s):
            self._host.kill()
            await self._is_gone_within(_KILL_GRACE_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._output.ended.wait(), _OUTPUT_GRACE_S)
        if self._watching is not None:
            self._watching.cancel()
        self._host.close()

    async def _is_gone_within(self, seconds: float) -> bool:
        deadline_s = self._clock() + seconds
        while not self._host.has_ended():
            if self._clock() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True


@dataclass(frozen=True, slots=True)
class _End:
    """How an incarnation ends, as far as that is known before its process is gone."""

    cause: str = ""  # none: its exit status tells
    remedy: str = ""  # if the user can mend it
    trace: str = ""
    grace_s: float = 0.0  # to end by itself
    is_stuck: bool = False
