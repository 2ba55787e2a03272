"""The host that is a child process of ours: connects its socket and its pipe to the event loop.

It decides nothing about the child's life; `serving.cluster.hosts.process` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence

from engine.config import EngineConfig
from serving.cluster.hosts.child import PROGRAM, Child
from serving.cluster.hosts.exit_watch import ExitWatch
from serving.errors import UserError

_DUMP_SIGNAL = signal.SIGUSR2  # `serving.instance` obeys it


class ChildHost:
    """See `serving.cluster.hosts.host`. The thread of the event loop must outlive the child."""

    def __init__(
        self, config: EngineConfig, child: Child | None = None, program: Sequence[str] = PROGRAM
    ) -> None:
        """`child` is a process that was started, and told to begin, before there was a loop."""
        self._config = config
        self._child = child
        self._program = program
        self._transports: list[asyncio.BaseTransport] = []
        self._exit: ExitWatch | None = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def node(self) -> str | None:
        return None

    async def open(
        self,
        received: asyncio.Protocol,
        printed: asyncio.Protocol,
        on_exit: Callable[[], None],
    ) -> asyncio.WriteTransport:
        loop = asyncio.get_running_loop()
        child = self._child = self._child or self._begun()
        pipe, _ = await loop.connect_read_pipe(lambda: printed, child.output)
        self._transports.append(pipe)
        connection, _ = await loop.create_unix_connection(lambda: received, sock=child.connection)
        self._transports.append(connection)
        # So that its exit is known even if a process that it started holds the connection open.
        with contextlib.suppress(OSError):
            self._exit = ExitWatch(child.pid, on_exit)
        return connection

    def has_ended(self) -> bool:
        return self._child is None or self._child.has_ended()

    def how_it_ended(self, last_words: str) -> str:
        assert self._child is not None
        return self._child.how_it_ended(last_words)

    def dump(self) -> None:
        self._signal(_DUMP_SIGNAL)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        if self._exit is not None:
            self._exit.close()
        for transport in self._transports:
            transport.close()
        if self._child is not None:
            self._child.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.signal(number)

    def _begun(self) -> Child:
        try:
            child = Child(self._program)
        except OSError as error:
            raise UserError(
                f"the process of the model cannot be started: {error.strerror}",
                "see that memory and the number of processes are not at their limits",
            ) from error
        child.begin(self._config)
        return child
