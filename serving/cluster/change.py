"""A change of the fleet that somebody asked for: what it is, how far it is, how it ended.

It is a record; `serving.cluster.fleet` makes the change.
"""

from __future__ import annotations

import logging
from typing import Any

from serving.errors import UserError

log = logging.getLogger(__name__)

_MAX_LINES = 2000  # a rolling restart of the largest fleet says less


class Change:
    """Belongs to the event loop's thread. Its lines go to the log too."""

    def __init__(self, number: int, kind: str, title: str) -> None:
        self.number = number
        self.kind = kind
        self.title = title
        self.is_done = False
        self.error: UserError | None = None
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        """Tell of one thing that happened."""
        log.info("%s: %s", self.title, line)
        if len(self._lines) < _MAX_LINES:
            self._lines.append(line)

    def fail(self, error: UserError) -> None:
        """Something did not go as asked; the first such error is kept."""
        log.error("%s: %s; %s", self.title, error.cause, error.remedy)
        self.error = self.error or error

    def state(self) -> dict[str, Any]:
        error = self.error
        return {
            "number": self.number,
            "kind": self.kind,
            "title": self.title,
            "done": self.is_done,
            "lines": list(self._lines),
            "error": None if error is None else {"cause": error.cause, "remedy": error.remedy},
        }
