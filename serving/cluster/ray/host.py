"""The host that is a Ray actor: placed by Ray, reached at our own data plane, killed by its pid.

Ray is asked to place it and, on another machine, to kill it. That it lives and dies is known by its
connection, with Ray or without.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.messages import Begin
from serving.cluster.hosts import wire
from serving.cluster.hosts.exit_watch import ExitWatch
from serving.cluster.hosts.frames import frame
from serving.cluster.placement import Placement
from serving.cluster.ray.control import RayControl
from serving.cluster.ray.messages import Dial, encode
from serving.cluster.ray.reception import Call, Expected, Reception
from serving.errors import UserError

_DUMP_SIGNAL = signal.SIGUSR2  # `serving.instance` obeys it
_ANSWER_S = 20.0  # for Ray to know of an actor: it is not well if that takes longer
_DIAL_S = 180.0  # for the actor to call in, after that; Ray itself gives up earlier


@dataclass(frozen=True, slots=True)
class Started:
    """What a host needs of the session that it is a part of."""

    control: RayControl
    reception: Reception


class RayHost:
    """See `serving.cluster.hosts.host`."""

    def __init__(
        self,
        dial: Callable[[str, str], Dial],
        name: str,
        config: EngineConfig,
        placement: Placement,
        session: Callable[[], Awaitable[Started]],
        remove: Callable[[str], None],
    ) -> None:
        """`dial` makes the address of a name and its secret; `session` starts one if need be;
        `remove` has nothing left of a name, by whichever control process there is then.
        """
        self.name = name
        self._dial = dial
        self._config = config
        self.placement = placement
        self._session = session
        self._remove = remove
        self._calls: list[Call] = []
        self._is_closed = False
        self._exit: ExitWatch | None = None

    @property
    def pid(self) -> int | None:
        return self._calls[0].pid if self._calls else None

    @property
    def node(self) -> str | None:
        return self._calls[0].node if self._calls else None

    @property
    def is_there(self) -> bool:
        """Whether its process has called in, and nobody has given it up."""
        return bool(self._calls) and not self._is_closed

    @property
    def local_pid(self) -> int | None:
        """Of its process, if that runs on this machine."""
        return None if self._exit is None or self._exit.has_ended() else self._exit.pid

    async def open(
        self,
        received: asyncio.Protocol,
        printed: asyncio.Protocol,
        on_exit: Callable[[], None],
    ) -> asyncio.WriteTransport:
        session = await self._session()
        expected = session.reception.expect(self.name)
        try:
            output, commands = await self._called(session.control, expected)
        except BaseException:
            expected.close()
            raise
        finally:
            session.reception.forget(expected)
        self._calls = [output, commands]
        if commands.is_local:
            with contextlib.suppress(OSError):  # it is gone already: the connection tells
                self._exit = ExitWatch(commands.pid, on_exit)
        output.hand_over(printed)
        commands.hand_over(received)
        commands.transport.write(frame(wire.encode(Begin(self._config))))
        return commands.transport

    async def _called(self, control: RayControl, expected: Expected) -> list[Call]:
        """Have it placed, and wait for its two calls. Raises UserError."""
        dial = encode(self._dial(expected.name, expected.secret))
        placing = control.place(self.name, self.placement, dial)
        calls = asyncio.ensure_future(expected.all_calls())
        try:
            waited: set[asyncio.Future[Any]] = {placing.registered, placing.ended, calls}
            await asyncio.wait(waited, timeout=_ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            if not any(future.done() for future in waited):
                control.discard()
                raise UserError(
                    f"Ray has not answered for {_ANSWER_S:g} s", "see whether its head is up"
                )
            waited = {placing.ended, calls}
            await asyncio.wait(waited, timeout=_DIAL_S, return_when=asyncio.FIRST_COMPLETED)
            if calls.done():
                return calls.result()
            if placing.ended.done():
                raise placing.ended.result()
            raise UserError(
                f"the actor has not called in within {_DIAL_S:g} s",
                "see Ray's logs, and whether its node reaches this machine",
            )
        finally:
            calls.cancel()

    def has_ended(self) -> bool:
        if self._exit is not None:
            return self._exit.has_ended()
        if not self._calls:
            return True
        # Elsewhere: what it prints to is closed when it ends, and not by us before that is seen.
        # Ray's word proves nothing: it writes a process off that does not answer.
        output, _ = self._calls
        return output.transport.is_closing()

    def how_it_ended(self, last_words: str) -> str:
        if not self.has_ended():
            return "it does not end, although it was killed"
        return (
            f"its process ended; it last said: {last_words}" if last_words else "its process ended"
        )

    def dump(self) -> None:
        if self._exit is not None:
            self._exit.signal(_DUMP_SIGNAL)

    def kill(self) -> None:
        if self._exit is not None:
            self._exit.signal(signal.SIGKILL)
        elif self._calls:  # elsewhere: its relay sees it, and kills it
            _, commands = self._calls
            commands.transport.abort()

    def close(self) -> None:
        if self._exit is not None:
            self._exit.close()
        for call in self._calls:
            call.transport.abort()
        self._is_closed = True
        self._remove(self.name)
