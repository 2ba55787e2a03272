"""Frames: how messages are told apart on a stream of bytes. Knows nothing of what is in them.

A frame is the length of its payload, 4 bytes and big-endian, and the payload. The same decoder
serves both ends: the driver feeds it what the event loop received, an instance what it read.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

# A report has at most 4,096 prompt tokens with 20 log-probabilities each, 1.3 MB, and a prompt has
# at most 5 bytes a token: so large a frame is garbage.
MAX_FRAME_BYTES = 32 << 20

_HEADER_BYTES = 4
_READ_BYTES = 1 << 16


class FrameError(Exception):
    """What was received, or is to be sent, is no frame; the connection has to end."""


def frame(payload: bytes) -> bytes:
    """Return the bytes to send. Raises FrameError for a payload that nobody would accept."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(payload):,} bytes, and {MAX_FRAME_BYTES:,} may be")
    return len(payload).to_bytes(_HEADER_BYTES, "big") + payload


class FrameDecoder:
    """Puts frames together from pieces of any size."""

    def __init__(self) -> None:
        self._received = bytearray()

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a frame is still incomplete: a stream may end here."""
        return not self._received

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the payloads that are complete now. Raises FrameError at a bad length.

        Every one must be taken before more is fed.
        """
        self._received += data
        at = 0
        try:
            while len(self._received) - at >= _HEADER_BYTES:
                start = at + _HEADER_BYTES
                size = int.from_bytes(self._received[at:start], "big")
                if size > MAX_FRAME_BYTES:
                    raise FrameError(
                        f"a frame of {size:,} bytes, and {MAX_FRAME_BYTES:,} may be: no frame"
                    )
                if len(self._received) < start + size:
                    break
                payload = bytes(self._received[start : start + size])
                at = start + size
                yield payload
        finally:
            del self._received[:at]


class FrameConnection:
    """Frames over a blocking socket. One thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = FrameDecoder()

    def send(self, payload: bytes) -> None:
        """Send a frame; waits while the other end does not read. Raises OSError, FrameError."""
        self._connection.sendall(frame(payload))

    def payloads(self) -> Iterator[bytes]:
        """Yield payloads until the other end closes. Raises OSError, FrameError."""
        while data := self._connection.recv(_READ_BYTES):
            yield from self._decoder.feed(data)
        if not self._decoder.is_empty:
            raise FrameError("the connection ended within a frame")
