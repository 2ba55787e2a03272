"""How long work tells the user where it is. Owns the protocol and its forms.

It never decides what is worth reporting, and never writes to stdout, which belongs to results.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from serving.logs import event

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


log = logging.getLogger(__name__)


class Progress(Protocol):
    """Work that passes through named phases, one at a time."""

    def phase(self, name: str, total: int | None) -> None:
        """Begin a phase, which ends the one before. `total` is in bytes or items; None: unknown."""

    def advance(self, done: int) -> None:
        """Say that `done` of the phase's total are done by now: absolute, not a difference."""


class NoProgress:
    """Says nothing: for tests and for callers that have no terminal."""

    def phase(self, name: str, total: int | None) -> None: ...

    def advance(self, done: int) -> None: ...


class LoggedProgress:
    """An event in the log for each phase, where stderr is read by a machine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def phase(self, name: str, total: int | None) -> None:  # noqa: ARG002
        event(log, logging.INFO, "starting", phase=name)

    def advance(self, done: int) -> None: ...

    def close(self) -> None: ...


class TerminalProgress:
    """Bars on a terminal, else one line per phase. Use it as a context manager.

    Nothing is shown, and rich is not imported, before the first phase: a start that finds
    everything in place stays silent and quick.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        self.close(finished=exc_type is None)

    def phase(self, name: str, total: int | None) -> None:
        if not self._stream.isatty():
            self._stream.write(f"{name}\n")
            self._stream.flush()
            return
        self._finish()
        self._task = self._started_bars().add_task(name, total=total)

    def advance(self, done: int) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done)

    def close(self, *, finished: bool = True) -> None:
        """Give the terminal back; `finished` fills the last bar; a failure leaves it."""
        if finished:
            self._finish()
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def _started_bars(self) -> RichProgress:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bars = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self._bars

    def _finish(self) -> None:
        """Fill the bar of the phase that ended: a phase of unknown length would pulse for ever."""
        if self._bars is None or self._task is None:
            return
        total = self._bars.tasks[self._task].total or 1
        self._bars.update(self._task, total=total, completed=total)
