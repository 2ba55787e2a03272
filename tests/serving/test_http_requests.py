"""Where one request ends and the next begins, whatever the bytes come in, and what is none."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from serving.http_connection import MAX_HEAD_BYTES, Connection
from tests.serving.test_http_connection import HEAD, WHOLE, exchange, run, until


async def echo(scope, receive, send):
    """Answer with the path and the body, as one line."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    told = scope["path"].encode() + b" " + body + b"\n"
    headers = [(b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


def post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([b"POST %b HTTP/1.1" % path, b"Host: a", length, *headers, b"", body])


CHUNKED = (
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;x=y\r\na\r\n\r\n\r\n3\r\nbcd\r\n0\r\nTrailer: x\r\n\r\n"
)
TO_UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
# What each asks and what it is told; the bodies look like the ends of heads.
PIPELINED = [
    (WHOLE, b"/ "),
    (post(b"/a", b"x\r\n\r\ny"), b"/a x\r\n\r\ny"),
    (CHUNKED, b"/c a\r\n\r\nbcd"),
    (post(b"/b", b"", *TO_UPGRADE), b"/b "),
    (CHUNKED.replace(b"Host: a", b"\r\n".join([b"Host: a", *TO_UPGRADE])), b"/c a\r\n\r\nbcd"),
    (post(b"/u", b"\r\n\r\nGET", *TO_UPGRADE), b"/u \r\n\r\nGET"),
    (b"\r\n" + post(b"/d", b"GET /x HTTP/1.1\r\n\r\n"), b"/d GET /x HTTP/1.1\r\n\r\n"),
]


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 40, 10_000])
def test_requests_are_the_same_however_their_bytes_come(num_bytes):
    old = (b"GET /old HTTP/1.0\r\n\r\n", b"/old ")  # the connection is closed behind it
    pairs = [*PIPELINED, *PIPELINED, old]
    sent = b"".join(asked for asked, _ in pairs)

    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        for start in range(0, len(sent), num_bytes):
            writer.write(sent[start : start + num_bytes])
            await asyncio.sleep(0)
        for _, told in pairs:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert await reader.readexactly(len(told) + 1) == told + b"\n"
        writer.close()

    run(scenario, app=echo, protocol=Connection)


async def stream(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for body, more in ((b"one\n", True), (b"two\n", True), (b"", False)):
        await send({"type": "http.response.body", "body": body, "more_body": more})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (b"HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", b"one\ntwo\n"),
        (b"HTTP/1.1\r\nHost: a\r\n\r\n", b"4\r\none\n\r\n4\r\ntwo\n\r\n0\r\n\r\n"),
    ],
)
def test_chunks_are_only_for_those_who_know_them(asked, told):
    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / " + asked)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert (b"chunked" in head) == told.startswith(b"4")
        assert await reader.readexactly(len(told)) == told
        if not told.startswith(b"4"):
            assert await reader.read() == b"", "it ends with the connection"
        writer.close()

    run(scenario, app=stream, protocol=Connection)


@pytest.mark.parametrize(
    ("asked", "app", "written"),
    [
        (b"GET / HTTP/1.1", stream, [b"one\n", b"two\n", b"0\r\n\r\n"]),
        (b"GET / HTTP/1.1", echo, [b"/ \n"]),
        (b"HEAD / HTTP/1.1", echo, [b"\r\n\r\n"]),
        (b"GET / HTTP/1.1\r\nExpect: 100-continue", echo, [b" 100 Continue\r\n\r\n", b"/ \n"]),
    ],
)
def test_the_head_of_an_answer_goes_with_the_first_of_its_body(asked, app, written):
    writes = []

    class Recording(Connection):
        def connection_made(self, transport):
            super().connection_made(transport)
            write = transport.write
            transport.write = lambda data: (writes.append(data), write(data))

    async def scenario(address, server):
        _, writer = await asyncio.open_connection(*address)
        for _ in range(2):  # and so has the next on the connection
            writes.clear()
            writer.write(asked + b"\r\nHost: a\r\n\r\n")
            await until(lambda: len(writes) == len(written))
            for data, part in zip(writes, written, strict=True):
                assert part in data
            *_, answer = [data for data in writes if data.startswith(b"HTTP/1.1")]
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()

    run(scenario, app=app, protocol=Recording)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a?x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a:99999/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_head_that_cannot_be_served_is_told_so(sent):
    async def scenario(address, server):
        answer = await asyncio.to_thread(exchange, address, sent)
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")

    run(scenario, app=echo, protocol=Connection)


CHUNKS = HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (HEAD, b"A: b\r\n"),
        (HEAD + b"A: ", b"b" * 1000),
        (CHUNKS + b"0\r\n", b"A: b\r\n"),
        (CHUNKS + b"0\r\nA: ", b"b" * 1000),
        (CHUNKS + b"1;a=", b"b" * 1000),
    ],
    ids=["fields", "field", "trailers", "trailer", "of a chunk"],
)
def test_what_is_no_body_and_does_not_end_is_refused(begin, endless):
    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(begin)
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * MAX_HEAD_BYTES // len(endless)):
                writer.write(endless)
                await writer.drain()
        status = b""
        with contextlib.suppress(ConnectionError):  # unread bytes are a reset, which may overtake
            status = await reader.readline()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        told = b"400" if begin.endswith(b";a=") else b"431"
        assert status == b"" or status.split()[1] == told
        await until(lambda: not server.server_state.connections)
        assert (await asyncio.to_thread(exchange, address, WHOLE)).status == 200

    run(scenario, app=echo, protocol=Connection)
