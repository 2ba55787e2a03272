"""One HTTP connection: uvicorn's, with bounds on how long it may say nothing whole.

Decides nothing about requests. What is no HTTP gets the same error object as any other mistake.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
import sys
from typing import Any, ClassVar

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestError,
    RequestTimedOut,
    Unavailable,
    UserError,
)

log = logging.getLogger(__name__)

# Of one head while it is incomplete; the application checks those that come in one piece.
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

_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


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


class Connection(H11Protocol):
    """Whoever connects must send a whole head within a time: the first, and each after it began.

    uvicorn bounds only the time between two requests.
    """

    head_timeout_s: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _room(self.max_connections):
            self._refuse(Unavailable("too many connections", code="too_many_connections"))
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.MUST_CLOSE:  # it said that its request was the last
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._time_head()
        else:
            self._stop_timing()

    def handle_events(self) -> None:
        """A hook of uvicorn, for what has come: listen to who waits for an answer all the time.

        uvicorn reads no more while something lies behind a whole request, even a line end; then
        asyncio does not notice that the client hangs up, and its answer is computed for nobody.
        """
        super().handle_events()
        if self.flow.read_paused and self._is_answering():
            if len(self.conn.trailing_data[0]) > MAX_AHEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Uvicorn calls this from where it caught h11's error."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if hint == HeadersTooLarge.status:
            self._refuse(HeadersTooLarge(f"the head must not exceed {MAX_HEAD_BYTES} bytes"))
        else:
            self._refuse(InvalidRequest("this is not a valid HTTP request"))

    def _should_upgrade(self) -> bool:
        return False  # to nothing, and without uvicorn's lines in the log for each who asks

    def _is_answering(self) -> bool:
        """Whether the last request has come whole, and its answer has not gone."""
        return not self.cycle.more_body and not self.cycle.response_complete

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _stop_timing(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            self._refuse(
                RequestTimedOut(f"the head did not arrive within {self.head_timeout_s:g} s")
            )
        else:
            self.transport.close()

    def _refuse(self, error: RequestError) -> None:
        """Answer and close; where an answer has begun, only close."""
        cycle: Any = self.cycle  # none before the first request
        if cycle is not None and not cycle.response_complete:
            # What is being answered came before what is wrong: nobody will read it any more.
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(error.body())
            headers = error.headers() | {
                "x-request-id": secrets.token_hex(16),
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            head = h11.Response(
                status_code=error.status,
                headers=list(headers.items()),
                reason=_REASONS[error.status],
            )
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class FewConnections(Connection):
    """Of operators: they must not take the files that clients and the instance need."""

    max_connections = 32
