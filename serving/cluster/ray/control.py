"""The API process's end of a Ray control process: started, asked, heard, and done without.

Owns that process and knows what became of each actor. It imports no ray, and waits for nothing
without a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

import msgspec

from scheduler.types import InstanceId
from serving.cluster.hosts.child import Child
from serving.cluster.hosts.frames import FrameDecoder, FrameError, frame
from serving.cluster.hosts.output import OutputRelay
from serving.cluster.hosts.process_session import end_session
from serving.cluster.hosts.received import Received
from serving.cluster.placement import Placement
from serving.cluster.ray import messages
from serving.cluster.ray.messages import (
    CannotOpen,
    ControlCommand,
    ControlReport,
    Ended,
    Keep,
    Open,
    Opened,
    Place,
    Placed,
    Remove,
)
from serving.errors import UserError

log = logging.getLogger(__name__)

_PROGRAM = ("-m", "serving.cluster.ray.backend")
_OPEN_S = 120.0  # for Ray to start; on a slow machine with a cold disk it takes a while
_END_S = 8.0  # for the process to take down what it started
_LOST_S = 1.0  # for one that hung up, to end
_POLL_S = 0.01
_REMEDY = "see Ray's logs, and whether the node of the instance reaches this machine"


class Placing:
    """One actor: `registered` when Ray knows of it, `ended` with the reason when it is no more."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.registered: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[UserError] = loop.create_future()

    def end(self, error: UserError) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


class RayControl:
    """One Ray session, of our own or joined. `open` and what follows belong to the event loop."""

    def __init__(self, order: Open) -> None:
        """Start the process. Raises OSError."""
        self._child = Child(_PROGRAM, own_session=True)
        with contextlib.suppress(ConnectionError):  # it has ended: whoever reads will see it
            self._child.connection.sendall(frame(messages.encode(order)))
        self._decoder = FrameDecoder()
        self._output = OutputRelay(InstanceId("ray"))
        self._transports: list[asyncio.BaseTransport] = []
        self._connection: asyncio.WriteTransport | None = None
        self._opened: asyncio.Future[Opened] | None = None
        self._was_open = False
        self._placings: dict[str, Placing] = {}
        self._burying: asyncio.Task[None] | None = None
        # Pids of instances that live, whatever becomes of the session.
        self.kept: Callable[[], list[int]] = list

    @property
    def is_lost(self) -> bool:
        """Whether the process has ended, or is about to: nothing can be placed any more."""
        return self._burying is not None

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it but what it placed."""
        return self._burying is not None and self._burying.done()

    async def open(self) -> Opened:
        """Wait until there is a session. Raises UserError."""
        loop = asyncio.get_running_loop()
        self._opened = loop.create_future()
        pipe, _ = await loop.connect_read_pipe(lambda: self._output, self._child.output)
        self._transports.append(pipe)
        self._connection, _ = await loop.create_unix_connection(
            lambda: Received(self._on_data, self._on_closed), sock=self._child.connection
        )
        self._transports.append(self._connection)
        try:
            return await asyncio.wait_for(self._opened, _OPEN_S)
        except TimeoutError:
            raise UserError(
                f"Ray has not started within {_OPEN_S:g} s",
                "see what it printed above, and its logs",
            ) from None

    def keep(self, placements: dict[str, Placement]) -> None:
        """Have nothing left of what earlier control processes have placed, but for these."""
        self._send(Keep(placements=placements))

    def place(self, name: str, placement: Placement, dial: bytes) -> Placing:
        """Have an actor made."""
        placing = Placing()
        if self.is_lost:
            placing.end(_lost_error())
        else:
            self._placings[name] = placing
            self._send(Place(name=name, placement=placement, dial=dial))
        return placing

    def remove(self, name: str) -> None:
        """Have nothing of this name left, if there is anything."""
        self._send(Remove(name=name))

    def discard(self) -> None:
        """Go on without it. What it has placed lives."""
        if self._burying is None:
            self._child.signal(signal.SIGKILL)
            self._lose()

    async def stop(self) -> None:
        """End it, and with a session of our own all of that; returns when it is gone."""
        if self._burying is None:
            if self._connection is None:
                self._child.connection.close()
            else:
                self._connection.abort()
            self._burying = asyncio.get_running_loop().create_task(self._bury(_END_S, []))
        await asyncio.shield(self._burying)

    # --- what comes from the process ---

    def _send(self, command: ControlCommand) -> None:
        if self._connection is not None and not self.is_lost:
            self._connection.write(frame(messages.encode(command)))

    def _on_data(self, data: bytes) -> None:
        try:
            for payload in self._decoder.feed(data):
                self._on_report(messages.decode_report(payload))
        except (FrameError, msgspec.DecodeError) as error:
            log.error("ray: it sent what is no message: %s", error)
            self.discard()

    def _on_report(self, report: ControlReport) -> None:
        assert self._opened is not None
        match report:
            case Opened():
                if not self._opened.done():
                    self._was_open = True
                    self._opened.set_result(report)
            case CannotOpen(cause=cause, remedy=remedy):
                if not self._opened.done():
                    self._opened.set_exception(UserError(cause, remedy))
            case Placed(name=name):
                placing = self._placings.get(name)
                if placing is not None and not placing.registered.done():
                    placing.registered.set_result(None)
            case Ended(name=name, cause=cause, remedy=remedy):
                placing = self._placings.pop(name, None)
                if placing is not None:
                    placing.end(UserError(cause, remedy or _REMEDY))

    def _on_closed(self) -> None:
        if self._burying is None:
            self._lose()

    def _lose(self) -> None:
        loop = asyncio.get_running_loop()
        if self._was_open:
            log.warning("Ray's control process has ended; instances that are up go on")
        self._burying = loop.create_task(self._bury(_LOST_S, self.kept()))
        if self._opened is not None and not self._opened.done():
            cause = f"Ray's control process ended: {self._output.last_line or 'it said nothing'}"
            self._opened.set_exception(UserError(cause, "see what it printed above"))
        for placing in self._placings.values():
            placing.end(_lost_error())
        self._placings.clear()

    async def _bury(self, grace_s: float, kept: list[int]) -> None:
        """Wait for its end, then make sure of it, and of all that it started."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + grace_s
        # Not reaped before its session has ended: until then the number is nobody else's.
        while self._child.is_running() and loop.time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        if not await asyncio.to_thread(end_session, self._child.pid, kept):
            log.error("processes of Ray's do not end, although they were killed")
        while not self._child.has_ended():  # noqa: ASYNC110 (a child has no event of its own)
            await asyncio.sleep(_POLL_S)
        for transport in self._transports:
            transport.close()
        self._child.close()


def _lost_error() -> UserError:
    return UserError(
        "Ray's control process has ended", "see Ray's logs; an instance that starts now tries anew"
    )
