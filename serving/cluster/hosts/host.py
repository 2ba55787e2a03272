"""What runs the program of an instance: a child process, or a Ray actor on some machine.

Owns the protocol alone. What the program says and how its end is told is the handle's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Host(Protocol):
    """One start of the program. Belongs to the event loop's thread."""

    @property
    def pid(self) -> int | None:
        """Of its process, once that is known; on another machine it is that machine's number."""
        ...

    @property
    def node(self) -> str | None:
        """The address of the machine that it runs on, if that may be another than this one."""
        ...

    async def open(
        self,
        received: asyncio.Protocol,
        printed: asyncio.Protocol,
        on_exit: Callable[[], None],
    ) -> asyncio.WriteTransport:
        """Have the program started and told what to build; return the way to it.

        What it sends goes to `received`, what it prints to `printed`; `on_exit` is called when its
        process is known to have ended, if that can be known without the connection. Raises
        UserError. When it is cancelled or fails, `close` lets go of what there is.
        """
        ...

    def has_ended(self) -> bool:
        """Whether nothing of it runs (any more)."""
        ...

    def how_it_ended(self, last_words: str) -> str:
        """Return it in words, of which those that it printed last may be a part."""
        ...

    def dump(self) -> None:
        """Have a stuck process print where its threads are, if that can be done."""
        ...

    def kill(self) -> None:
        """End it, whatever it is doing; that it has ended is known later."""
        ...

    def close(self) -> None:
        """Let go of all that belongs to it here. May be called twice."""
        ...
