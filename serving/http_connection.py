"""One HTTP connection: uvicorn's, with bounds on how long it may say nothing whole.

Decides nothing about requests. What is no HTTP gets the same error object as any other mistake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import secrets
from typing import TYPE_CHECKING, Any, ClassVar, cast

import msgspec
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestError,
    RequestTimedOut,
    Unavailable,
    UserError,
)
from serving.http_body import ChunkedBody, DeclaredBody

if TYPE_CHECKING:
    from uvicorn._types import (
        ASGI3Application,
        ASGIReceiveCallable,
        ASGISendCallable,
        ASGISendEvent,
        Scope,
    )

log = logging.getLogger(__name__)

# Of one head; the application bounds its fields more narrowly.
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
_NO_HTTP = "this is not a valid HTTP request"


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
    parser gets one whole head at a time, and only heads: bodies are taken as the head says, and
    what a client sends on while it waits for an answer is kept as it came. So it is noticed all
    the time that a client hangs up, and one that would upgrade is answered as if it had not asked.
    """

    # Not among uvicorn's: a dictionary of so many takes 1.5 KiB a connection.
    __slots__ = ("_body", "_head_timer", "_num_searched", "_received")

    head_timeout_s: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._received = b""  # and not taken
        self._num_searched = 0  # of it, for the end of a head
        self._body: DeclaredBody | ChunkedBody | None = None  # as long as some is to come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _room(self.max_connections):
            self._refuse(Unavailable("too many connections", code="too_many_connections"))
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._received = self._received + data if self._received else data
        self._take()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing()
        self._received = b""
        super().connection_lost(exc)

    # --- one request at a time ---

    def _take(self) -> None:
        """Take what has come, up to the end of the request that is to be answered next."""
        try:
            while self._received and not (self._is_answering() or self.transport.is_closing()):
                if not (self._take_head() if self._body is None else self._take_body(self._body)):
                    break
        except RequestError as error:
            self._refuse(error)
        except HttpParserError:
            self._refuse(InvalidRequest(_NO_HTTP))
        if self.transport.is_closing():
            return
        if not self._is_answering():
            if self._body is None:
                self._time_head()
        elif len(self._received) > MAX_AHEAD_BYTES:
            self.transport.abort()

    def _take_head(self) -> bool:
        """Return whether there was a whole one. Raises RequestError, HttpParserError."""
        if not self._num_searched:
            self._received = self._received.lstrip(b"\r\n")  # that is allowed before it
        found = self._received.find(_BLANK_LINE, max(0, self._num_searched - 3))
        end = found + len(_BLANK_LINE) if found >= 0 else len(self._received)
        if end > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"the head must not exceed {MAX_HEAD_BYTES} bytes")
        if found < 0:
            self._num_searched = end
            return False
        head, self._received, self._num_searched = self._received[:end], self._received[end:], 0
        self._stop_timing()
        before, self.parser = self.cycle, HttpRequestParser(self)
        with contextlib.suppress(HttpParserUpgrade):
            self.parser.feed_data(head)
        if self.cycle is before:  # the preface of HTTP/2
            raise InvalidRequest(_NO_HTTP)
        if self._body is None:
            self._end_request()
        return True

    def _take_body(self, body: DeclaredBody | ChunkedBody) -> bool:
        """Return whether it is complete. Raises RequestError."""
        taken = body.take(self._received)
        self._received = taken.rest
        if taken.body:
            self.on_body(taken.body)
        if taken.is_complete:
            self._body = None
            self._end_request()
        return taken.is_complete

    def _end_request(self) -> None:
        super().on_message_complete()
        self.flow.resume_reading()  # however large the body was: else a hang-up is not seen

    def _is_answering(self) -> bool:
        """Whether the last request has come whole, and its answer has not gone."""
        cycle: Any = self.cycle  # none before the first request
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    # --- hooks of the parser and of uvicorn; what those of the parser raise is no valid request ---

    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.strip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        headers = dict(self.headers)
        names = [name for name, _ in self.headers]
        is_old = self.parser.get_http_version() == "1.0"
        num_hosts = names.count(b"host")
        if num_hosts > 1 or not (num_hosts or is_old):
            raise ValueError("not one Host")
        if names.count(b"transfer-encoding") > 1:
            raise ValueError("more than one coding")
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise ValueError("a coding that nobody decodes")
        if is_old:  # its clients know no answer but one, and none in chunks
            self.expect_100_continue = False
        super().on_headers_complete()
        if b"transfer-encoding" in headers:
            self._body = ChunkedBody()
        elif num_bytes := int(headers.get(b"content-length", 0)):
            self._body = DeclaredBody(num_bytes)

    def on_message_complete(self) -> None:
        """Of a head the parser does not know what follows."""

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._received and not self.transport.is_closing():
            self._take()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(cycle, app)
        if cycle.scope["method"] != "HEAD":  # whose answers are nothing but heads
            cycle.transport = cast("asyncio.Transport", _HeadWithBody(cycle))
        super()._start_asgi_task(cycle, app)

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
        if self._received:
            self._refuse(
                RequestTimedOut(f"the head did not arrive within {self.head_timeout_s:g} s")
            )
        else:
            self.transport.close()

    def _refuse(self, error: RequestError) -> None:
        """Answer and close; where an answer has begun, only close."""
        cycle: Any = self.cycle  # none before the first request
        if cycle is None or cycle.response_complete:
            may_answer = self._body is None  # else the rest of one that is answered is wrong
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


class _HeadWithBody:
    """The transport of one answer until it begins: its head goes with the first of its body.

    ASGI has it so, and it saves a packet and a waking of the client; uvicorn writes them apart.
    An application that fails in between is one that never answered.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._cycle.transport = self._transport
            self._transport.write(self._head + data)
        elif self._cycle.response_started:
            self._head = data
        else:  # 100 Continue
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _without_chunks(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """Have an answer of unknown length end with its connection, as those before HTTP/1.1 do."""

    async def plain(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        async def send_plain(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start":
                cycle.chunked_encoding = False
            elif message["type"] == "http.response.body":  # of each part, where uvicorn counts all
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return plain


class FewConnections(Connection):
    """Of operators: they must not take the files that clients and the instance need."""

    max_connections = 32
