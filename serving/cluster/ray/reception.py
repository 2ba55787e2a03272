"""Where instances that others started call in: who may, which call is whose, strangers cut off.

Owns the listening socket and every connection until its first frame has told whose it is. It never
looks into what follows.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from serving.cluster.ray.messages import COMMANDS, MAX_HELLO_BYTES, OUTPUT, Hello, decode_hello
from serving.errors import UserError
from serving.version import version

_HELLO_S = 5.0  # for a caller to say who it is
_MAX_NUM_STRANGERS = 64  # of those that have not said it; one more, and the first has to go
_HEADER_BYTES = 4
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class Call:
    """A connection that is an incarnation's, paused; `rest` came behind its first frame."""

    transport: asyncio.Transport
    rest: bytes
    pid: int
    node: str | None  # where it came from; None: this machine, and the kernel vouches for the pid

    @property
    def is_local(self) -> bool:
        return self.node is None

    def hand_over(self, protocol: asyncio.Protocol) -> None:
        """Let `protocol` have all that comes from now on."""
        self.transport.set_protocol(protocol)
        if self.rest:
            protocol.data_received(self.rest)
        self.transport.resume_reading()


class Expected:
    """An incarnation that will call in, once on each channel."""

    def __init__(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.secret = secrets.token_urlsafe(32)
        self.calls: dict[str, asyncio.Future[Call]] = {
            channel: loop.create_future() for channel in (OUTPUT, COMMANDS)
        }

    async def all_calls(self) -> list[Call]:
        """Wait for both. Raises UserError when it is not one of ours."""
        return await asyncio.gather(*self.calls.values())

    def close(self) -> None:
        """Nobody waits any more: let go of what came."""
        for call in self.calls.values():
            if call.done() and not call.cancelled() and call.exception() is None:
                call.result().transport.abort()
            call.cancel()


class Reception:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._expected: dict[str, Expected] = {}
        self._strangers: dict[_Caller, None] = {}  # in the order in which they came
        self._server: asyncio.Server | None = None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open_local(self, path: Path) -> None:
        """Listen at a Unix socket; its folder must be private."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Caller(self, None), str(path))

    async def open_remote(self, host: str, tls: ssl.SSLContext) -> int:
        """Listen at a free port of `host`, for those with a certificate; return the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Caller(self, tls), host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def expect(self, name: str) -> Expected:
        """Admit the incarnation of this name, until `forget`."""
        expected = self._expected[name] = Expected(name)
        return expected

    def forget(self, expected: Expected) -> None:
        self._expected.pop(expected.name, None)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for stranger in list(self._strangers):
            stranger.cut_off()
        for expected in self._expected.values():
            expected.close()

    # --- callers ---

    def came(self, caller: _Caller) -> None:
        if len(self._strangers) >= _MAX_NUM_STRANGERS:
            next(iter(self._strangers)).cut_off()
        self._strangers[caller] = None

    def left(self, caller: _Caller) -> None:
        self._strangers.pop(caller, None)

    def is_welcome(self, hello: Hello, caller: asyncio.Transport, rest: bytes) -> bool:
        """Hand the connection to who expects it, if anybody does."""
        expected = self._expected.get(hello.name)
        if expected is None or not hmac.compare_digest(
            expected.secret.encode(), hello.secret.encode()
        ):
            return False
        call = expected.calls.get(hello.channel)
        if call is None or call.done():  # the secret is good for one call a channel
            return False
        if hello.version != version():
            call.set_exception(
                UserError(
                    f"the node of an instance has hocket {hello.version}, this server {version()}",
                    "install the same version on every node of the cluster",
                )
            )
            return False
        connection = caller.get_extra_info("socket")
        node, pid = None, hello.pid
        if connection.family == socket.AF_UNIX:
            pid = _pid_of(connection)
        else:
            node = caller.get_extra_info("peername")[0]
        call.set_result(Call(caller, rest, pid, node))
        return True


class _Caller(asyncio.Protocol):
    """One that has not said yet who it is."""

    def __init__(self, reception: Reception, tls: ssl.SSLContext | None) -> None:
        self._reception = reception
        self._tls = tls
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._proving: asyncio.Task[None] | None = None
        self._is_proven = False
        self._too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._reception.came(self)
        loop = asyncio.get_running_loop()
        self._too_late = loop.call_later(_HELLO_S, self.cut_off)
        if self._tls is not None:
            transport.pause_reading()
            self._proving = loop.create_task(self._prove(transport, self._tls))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._tls is None or self._is_proven:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._leave()

    def cut_off(self) -> None:
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def _look(self) -> None:
        if len(self._received) < _HEADER_BYTES:
            return
        size = int.from_bytes(self._received[:_HEADER_BYTES], "big")
        end = _HEADER_BYTES + size
        if not 0 < size <= MAX_HELLO_BYTES:
            self.cut_off()
        elif len(self._received) >= end:
            self._said(bytes(self._received[_HEADER_BYTES:end]), bytes(self._received[end:]))

    def _said(self, hello: bytes, rest: bytes) -> None:
        assert self._transport is not None
        self._transport.pause_reading()
        try:
            is_welcome = self._reception.is_welcome(decode_hello(hello), self._transport, rest)
        except msgspec.DecodeError:
            is_welcome = False
        if is_welcome:
            self._leave()
        else:
            self.cut_off()

    async def _prove(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Have it show its certificate, before a byte of it is looked at."""
        loop = asyncio.get_running_loop()
        try:
            self._transport = await loop.start_tls(
                transport, self, tls, server_side=True, ssl_handshake_timeout=_HELLO_S
            )
        except OSError:  # a stranger, or it has gone; an SSLError is one, too
            self.cut_off()
            return
        self._is_proven = True
        self._look()  # what came behind the handshake

    def _leave(self) -> None:
        self._reception.left(self)
        if self._too_late is not None:
            self._too_late.cancel()
        if self._proving is not None and self._proving is not asyncio.current_task():
            self._proving.cancel()


def _pid_of(connection: socket.socket) -> int:
    """Return who is at the other end of a Unix socket, by the kernel's word."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    pid: int = _PEER_CREDENTIALS.unpack(credentials)[0]
    return pid
