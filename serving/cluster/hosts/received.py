"""What a connection brings and that it ends, handed on to whoever decodes it. It keeps nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Received(asyncio.Protocol):
    """Belongs to the event loop's thread."""

    def __init__(self, on_data: Callable[[bytes], None], on_closed: Callable[[], None]) -> None:
        self._on_data = on_data
        self._on_closed = on_closed

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._on_closed()
