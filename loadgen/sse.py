"""Server-sent events as they arrive: bytes in, the data of whole events out.

Follows the HTML standard, section 9.2, as far as OpenAI-compatible servers use it: lines end in LF,
CRLF or CR, comments and fields other than `data` are skipped.
"""

from __future__ import annotations

_MAX_EVENT_BYTES = 64 << 20


class EventTooLong(Exception):
    """An event did not end within 64 MiB."""


class EventSplitter:
    """Keeps what has come of the next event until it is whole."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of every event that is whole now."""
        if b"\r" in data or b"\r" in self._rest:
            return self._feed_with_returns(data)
        data = self._rest + data if self._rest else data
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise EventTooLong
        return [found for event in events if (found := _data_of(event)) is not None]

    def _feed_with_returns(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        # A CR at the end may be half of a CRLF.
        data, held = (data[:-1], b"\r") if data.endswith(b"\r") else (data, b"")
        self._rest = b""
        events = self.feed(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        self._rest += held
        return events


def _data_of(event: bytes) -> bytes | None:
    """Return the data lines of one event, joined, or None if there are none."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event[5:6] == b" " else event[5:]
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines) if lines else None
