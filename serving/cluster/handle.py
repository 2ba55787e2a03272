"""The driver's reference to an instance, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.messages import Command, Ready, Report
from scheduler.types import InstanceId
from serving.errors import UserError

_MAX_CAUSE_CHARS = 500


class InstanceHandle(Protocol):
    """Commands go in, reports come back on the event loop, in order.

    A handle is one incarnation of an instance. After a `Failed` report, and after `stop`, nothing
    follows and commands are dropped; what was stopped has not failed.
    """

    @property
    def instance_id(self) -> InstanceId: ...

    async def start(self, on_report: Callable[[Report], None]) -> Ready:
        """Bring the instance up. Raises UserError when it cannot serve, whatever the reason.

        A stop meanwhile cancels it.
        """
        ...

    def send(self, command: Command) -> None:
        """Hand a command over; never waits."""
        ...

    async def stop(self) -> None:
        """End the instance; running requests are lost. May be called twice."""
        ...


def ended_while_starting(cause: str) -> UserError:
    """Return what `start` raises when the instance itself did not know what was wrong."""
    return UserError(
        f"the process of the model ended while it started: {cause}",
        "if memory ran out lower --kv-memory, else see above what it printed",
    )


def one_line(text: str) -> str:
    """Return words that may be many lines as the one line that a cause is."""
    return " ".join(text.split())[:_MAX_CAUSE_CHARS]
