"""What a start of an instance tells: where it is, how long each phase took, why it cannot be done.

Light, so that a process that only watches a start need not import what a start needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Where a start is: phases in turn, and how far the current one has come."""

    def phase(self, name: str, total: int | None) -> None: ...

    def advance(self, done: int) -> None: ...


class StartupTimes:
    """Seconds of each phase of a start; a phase that comes twice adds up."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, title: str, total: int | None = None) -> Iterator[None]:
        self._progress.phase(title, total)
        start_s = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s

    def advance(self, done: int) -> None:
        self._progress.advance(done)


class CannotStart(Exception):
    """The machine cannot run what was asked for: `cause` and `remedy`, a line each."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return self.cause
