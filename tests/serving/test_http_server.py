"""More clients than there are open files, or than the loop can take at once; an end at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
from urllib.parse import urlsplit

from serving.http_server import AcceptFailures, HttpServer
from serving.listener import bind
from serving.ports import Port, PortRules
from tests.serving.servers import running_server
from tests.serving.test_http import LONG, call, metric, wait_until
from tests.serving.test_overload import post

LIMIT = 200
_PRELUDE = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))"


def answers(server):
    with contextlib.suppress(ConnectionError):
        response, payload = call(server, "POST", "/v1/completions", LONG | {"max_tokens": 2})
        return response.status == 200 and json.loads(payload)["usage"]["completion_tokens"] == 2


def test_a_flood_of_connections_neither_fills_the_log_nor_stops_who_is_served():
    clients = contextlib.ExitStack()
    with running_server("--fake", prelude=_PRELUDE) as server, clients:
        lines = []
        threading.Thread(target=lines.extend, args=(server.process.stderr,), daemon=True).start()
        stream = post(server, LONG | {"stream": True, "max_tokens": 200})
        response = stream.getresponse()
        assert response.status == 200
        at = urlsplit(server.url)
        for _ in range(2 * LIMIT):
            raw = clients.enter_context(socket.socket())
            raw.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                raw.connect((at.hostname, at.port))
        assert response.read().endswith(b"data: [DONE]\n\n")
        stream.close()
        clients.close()
        wait_until(lambda: answers(server))
        assert metric(server, "hocket_requests_running") == 0
        assert server.terminate() == 0
    assert len(lines) < 10, lines[:10]


def test_what_cannot_be_accepted_is_a_line_a_second(caplog):
    now = 0.0
    handler = AcceptFailures(clock=lambda: now)
    full = OSError(errno.EMFILE, "Too many open files")
    loop = asyncio.new_event_loop()
    try:
        for now in (0.0, 0.0, 0.9, 1.0, 1.5):  # noqa: B007 (the clock reads it)
            handler(loop, {"message": "", "exception": full, "socket": None})
        assert caplog.messages == ["clients cannot be accepted"] * 2
        for context in ({"exception": full}, {"exception": ValueError("x"), "socket": None}):
            handler(loop, {"message": "something else", **context})
        assert [record.name for record in caplog.records[2:]] == ["asyncio"] * 2, "as it would say"
    finally:
        loop.close()


def test_an_end_at_once_hangs_up_and_is_nobodys_fault(caplog):
    for name in ("uvicorn.error", "uvicorn.access"):  # which uvicorn sets for good
        caplog.set_level(logging.ERROR, name)

    async def answer_until_nobody_reads(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run():
        with bind("127.0.0.1", 0) as listener:
            server = HttpServer(Port(listener, PortRules()))
            server.entrance.open(answer_until_nobody_reads)
            async with server.running(lambda: None):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await reader.readuntil(b"a\r\n")
                server.force_exit = True
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
    assert caplog.messages == []
