"""What an instance's process prints: into our log, line by line, and the last lines kept.

Owns the reading end of the pipe on the event loop. A line is cut, never waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from scheduler.types import InstanceId

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 2000
_NUM_KEPT = 20


class OutputRelay(asyncio.Protocol):
    """Belongs to the event loop's thread."""

    def __init__(self, instance_id: InstanceId) -> None:
        self.ended = asyncio.Event()
        self._instance_id = instance_id
        self._last: deque[str] = deque(maxlen=_NUM_KEPT)
        self._unfinished = b""

    @property
    def last_line(self) -> str:
        return self._last[-1] if self._last else ""

    def data_received(self, data: bytes) -> None:
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            self._relay(line)
        if len(self._unfinished) > _MAX_LINE_BYTES:
            self._relay(self._unfinished)
            self._unfinished = b""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._relay(self._unfinished)
        self._unfinished = b""
        self.ended.set()

    def _relay(self, line: bytes) -> None:
        text = line[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self._last.append(text)
            log.warning("%s: %s", self._instance_id, text)
