"""One HTTP connection: uvicorn's, with bounds on how long it may say nothing whole.

Decides nothing about requests. What is no HTTP gets the same error object as any other mistake.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
from typing import Any, ClassVar

import msgspec
from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestError,
    RequestTimedOut,
    Unavailable,
    UserError,
)

log = logging.getLogger(__name__)

# Of one head, or of what else is no body: trailers, and what is said of chunks.
MAX_HEAD_BYTES = 64 << 10
# Of what a client sends on while it waits for an answer: its next requests, or nothing of sense.
MAX_AHEAD_BYTES = 64 << 10

MAX_CONNECTIONS = 8192
# Connections that the event loop accepts before it looks at those accepted. Each holds a descriptor
# from then on, so a burst must not take what is reserved.
ACCEPTS_AT_ONCE = 8
# For all else: those accepted and not yet counted, about four turns of the loop, and some 40 for
# the instance, also when it starts again, renderers, logs and operators.
_RESERVED_FILES = 128
_FEWEST_CONNECTIONS = 16

_BLANK_LINE = b"\r\n\r\n"
_PIECE_BYTES = 16 << 10  # for the parser at a time, of what is no body of a known length


def raise_file_limit() -> None:
    """Let this process have all the connections it would serve, as far as the system lets it.

    A login's limit is often 1,024 and may be raised; where it may not, fewer are served.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def check_file_limit(max_num_streams: int) -> None:
    """Raise the limit, and say if streams will lack connections. Raises UserError if all would."""
    raise_file_limit()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_connections = _room(MAX_CONNECTIONS)
    if num_connections < _FEWEST_CONNECTIONS:
        raise UserError(
            f"this process may open {soft} files, which leaves none for clients",
            f"raise the limit to {MAX_CONNECTIONS + _RESERVED_FILES}: ulimit -n, or LimitNOFILE",
        )
    if num_connections < min(max_num_streams, MAX_CONNECTIONS):
        log.warning(
            "this process may open %d files: %d clients can connect, fewer than the %d streams "
            "of --max-num-streams; raise the limit (ulimit -n, LimitNOFILE)",
            *(soft, num_connections, max_num_streams),
        )


def _room(max_connections: int) -> int:
    """Return how many connections there may be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return min(max_connections, soft - _RESERVED_FILES)


class Connection(HttpToolsProtocol):
    """Whoever connects must send a whole head within a time: the first, and each after it began.

    uvicorn bounds the time between two requests, but no head and not what is sent ahead. Here the
    parser is fed one request at a time: what a client sends on while it waits for an answer is
    kept as it came, and that it hangs up is noticed all the time.
    """

    head_timeout_s: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True  # of the first or the next request, or before it
        self._ahead = b""
        self._fed_last = b""  # the end of a head may come in two pieces
        self._num_body_bytes_left = 0  # if their number was declared
        self._is_body_parsed = True
        self._num_other_bytes = 0  # since there was some body, or a request was whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _room(self.max_connections):
            self._refuse(Unavailable("too many connections", code="too_many_connections"))
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        data = self._ahead + data if self._ahead else data
        self._ahead = b""
        while data and not (self._is_answering() or self.transport.is_closing()):
            end = self._end_of_piece(data)
            self._take(data[:end])
            data = data[end:]
        if self.transport.is_closing():
            return
        if self._is_answering():
            self._ahead = data
            if len(data) > MAX_AHEAD_BYTES:
                self.transport.abort()
        elif self._is_in_head:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing()
        self._ahead = b""
        super().connection_lost(exc)

    # --- one request at a time ---

    def _end_of_piece(self, data: bytes) -> int:
        """Return how much to take: no request ends within it, unless at its end."""
        if self._num_body_bytes_left:
            self._fed_last = b""
            return min(self._num_body_bytes_left, len(data))
        seam = self._fed_last + data[:_PIECE_BYTES]
        at = seam.find(_BLANK_LINE)  # behind heads, and behind bodies that come in chunks
        end = len(seam) if at < 0 else at + len(_BLANK_LINE)
        self._fed_last, num_before = seam[max(0, end - 3) : end], len(self._fed_last)
        return end - num_before

    def _take(self, piece: bytes) -> None:
        if self._num_body_bytes_left:
            self._num_body_bytes_left -= len(piece)
        else:
            self._num_other_bytes += len(piece)
        if self._num_other_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadersTooLarge(f"the head must not exceed {MAX_HEAD_BYTES} bytes"))
        elif self._is_body_parsed:
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade:
                pass  # to nothing: it is answered as if it had not asked
            except HttpParserError:
                self._refuse(InvalidRequest("this is not a valid HTTP request"))
        else:
            self.on_body(piece)
            if not self._num_body_bytes_left:
                self._is_body_parsed = True
                self.on_message_complete()

    # --- events of the parser, hooks of uvicorn; what they raise is no valid request ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # else it is a trailer, which nobody reads
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        headers = dict(self.headers)
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError("not one Host")
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise ValueError("a coding that nobody decodes")
        self._num_body_bytes_left = int(headers.get(b"content-length", 0))
        if self.parser.should_upgrade():
            # The parser takes what follows for another protocol, but it is the body.
            self._is_body_parsed = not self._num_body_bytes_left
            if b"transfer-encoding" in headers:
                raise ValueError("a request to upgrade, with a body in chunks")
        self._is_in_head = False
        self._stop_timing()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_body_parsed:
            self._is_in_head, self._num_other_bytes = True, 0
            super().on_message_complete()
            self.flow.resume_reading()  # however large the body was: else a hang-up is not seen

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ahead and not self.transport.is_closing():
            self.data_received(b"")

    def _should_upgrade(self) -> bool:
        return False

    def _is_answering(self) -> bool:
        """Whether the last request has come whole, and its answer has not gone."""
        cycle: Any = self.cycle  # none before the first request
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    # --- bounds ---

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _stop_timing(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._num_other_bytes:
            self._refuse(
                RequestTimedOut(f"the head did not arrive within {self.head_timeout_s:g} s")
            )
        else:
            self.transport.close()

    def _refuse(self, error: RequestError) -> None:
        """Answer and close; where an answer has begun, only close."""
        cycle: Any = self.cycle  # none before the first request
        if cycle is None or cycle.response_complete:
            may_answer = self._is_in_head  # else what is wrong is the rest of one that is answered
        else:
            may_answer = not cycle.response_started
            # What is being answered came before what is wrong: nobody will read it any more.
            cycle.disconnected = True
            cycle.message_event.set()
        if may_answer:
            body = msgspec.json.encode(error.body())
            headers = error.headers() | {
                "x-request-id": secrets.token_hex(16),
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
            self.transport.write(STATUS_LINE[error.status] + b"".join(lines) + b"\r\n" + body)
        self.transport.close()


class FewConnections(Connection):
    """Of operators: they must not take the files that clients and the instance need."""

    max_connections = 32
