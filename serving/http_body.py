"""Where the body of a request ends: after so many bytes, or with its last chunk (RFC 9112, 6).

Both kinds `take` what has come and return what of it is body, what is left for later, and whether
the body is complete. They raise RequestError for what is no such body.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from serving.errors import HeadersTooLarge, InvalidRequest

MAX_TRAILER_BYTES = 64 << 10
_MAX_LINE_BYTES = 4 << 10  # before a chunk: its size, and extensions that nobody reads
_LINE_END = b"\r\n"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n\0]*)?")


class Taken(NamedTuple):
    body: bytes
    rest: bytes
    is_complete: bool


class DeclaredBody:
    """Of a known length."""

    def __init__(self, num_bytes: int) -> None:
        self._num_left = num_bytes

    def take(self, data: bytes) -> Taken:
        body, rest = data[: self._num_left], data[self._num_left :]
        self._num_left -= len(body)
        return Taken(body, rest, self._num_left == 0)


class ChunkedBody:
    """In chunks, each after a line with its size; behind the last one there may be trailers."""

    def __init__(self) -> None:
        self._num_left = 0  # of a chunk, and the line end behind it
        self._is_behind_last = False
        self._num_trailer_bytes = 0

    def take(self, data: bytes) -> Taken:
        parts: list[bytes] = []
        at = 0
        while not self._is_behind_last:
            if self._num_left > len(_LINE_END):
                part = data[at : at + self._num_left - len(_LINE_END)]
                parts.append(part)
                at += len(part)
                self._num_left -= len(part)
            end = at + self._num_left
            if end > len(data):
                break
            if self._num_left and data[at:end] != _LINE_END:
                raise InvalidRequest("a chunk of the body is longer than it says")
            self._num_left, at = 0, end
            end = data.find(_LINE_END, at, at + _MAX_LINE_BYTES)
            if end < 0:
                if len(data) - at >= _MAX_LINE_BYTES:
                    raise InvalidRequest("a chunk of the body has no size")
                break
            size = _SIZE.fullmatch(data, at, end)
            if size is None:
                raise InvalidRequest("a chunk of the body has no size")
            at = end + len(_LINE_END)
            num_bytes = int(size[1], 16)
            self._num_left = num_bytes + len(_LINE_END) if num_bytes else 0
            self._is_behind_last = not num_bytes
        is_complete = False
        if self._is_behind_last:
            at, is_complete = self._skip_trailers(data, at)
        return Taken(b"".join(parts), data[at:], is_complete)

    def _skip_trailers(self, data: bytes, at: int) -> tuple[int, bool]:
        """Return where the first line that is not complete begins, or what is behind the last."""
        while (end := data.find(_LINE_END, at)) >= 0:
            if end == at:
                return end + len(_LINE_END), True
            self._num_trailer_bytes += end - at
            at = end + len(_LINE_END)
        if self._num_trailer_bytes + len(data) - at > MAX_TRAILER_BYTES:
            raise HeadersTooLarge(f"trailers must not exceed {MAX_TRAILER_BYTES} bytes")
        return at, False
