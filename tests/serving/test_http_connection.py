"""Connections that say nothing, too little or too slowly, on a server with short times."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket

import pytest
import uvicorn

from serving.api.body_limit import BodyLimit
from serving.errors import UserError
from serving.http_connection import (
    Connection,
    check_file_limit,
    raise_file_limit,
)
from tests.serving.raw import Answer, receive


async def answer_ok(scope, receive, send):
    """An application that reads nothing."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


class Quick(Connection):
    head_timeout_s = 0.2


@contextlib.asynccontextmanager
async def serving(protocol=Quick, app=answer_ok):
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname(), server
    finally:
        server.should_exit = True
        await task


def exchange(address, *pieces) -> Answer | None:
    """Send pieces and return the answer, None if the connection was closed without one."""
    with socket.create_connection(address, timeout=5) as raw:
        for piece in pieces:
            raw.sendall(piece)
        try:
            return receive(raw)
        except (ConnectionError, OSError):
            return None


def run(scenario, **settings):
    async def served():
        async with serving(**settings) as (address, server):
            await scenario(address, server)

    asyncio.run(served())


HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def test_a_head_that_does_not_end_is_408():
    async def scenario(address, server):
        answer = await asyncio.to_thread(exchange, address, HEAD)
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")

    run(scenario)


def test_who_connects_and_says_nothing_is_let_go():
    async def scenario(address, server):
        assert await asyncio.to_thread(exchange, address) is None
        assert not server.server_state.connections

    run(scenario)


def test_a_head_that_drips_is_cut_off_all_the_same():
    """Each byte came in time; the whole did not."""

    def drip(address):
        with socket.create_connection(address, timeout=5) as raw:
            with contextlib.suppress(ConnectionError):
                for byte in HEAD * 100:
                    raw.sendall(bytes([byte]))
                    if raw in select_readable(raw):
                        break
            return receive(raw).status

    async def scenario(address, server):
        assert await asyncio.to_thread(drip, address) == 408

    run(scenario)


def select_readable(raw):
    import select

    return select.select([raw], [], [], 0.02)[0]


def test_the_second_head_is_timed_too():
    def twice(address):
        with socket.create_connection(address, timeout=5) as raw:
            raw.sendall(HEAD + b"\r\n")
            first = receive(raw).status
            raw.sendall(HEAD)
            return first, receive(raw).status

    async def scenario(address, server):
        assert await asyncio.to_thread(twice, address) == (200, 408)

    run(scenario)


def test_an_idle_connection_may_wait_longer_than_a_head():
    def with_a_pause(address):
        import time

        with socket.create_connection(address, timeout=5) as raw:
            raw.sendall(HEAD + b"\r\n")
            first = receive(raw).status
            time.sleep(2 * Quick.head_timeout_s)
            raw.sendall(HEAD + b"\r\n")
            return first, receive(raw).status

    async def scenario(address, server):
        assert await asyncio.to_thread(with_a_pause, address) == (200, 200)

    run(scenario)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the server does it by itself)
            await asyncio.sleep(0.001)


def test_too_many_connections_are_told_to_come_back():
    class Narrow(Connection):
        max_connections = 2

    async def scenario(address, server):
        held = [await asyncio.to_thread(socket.create_connection, address) for _ in range(2)]
        await until(lambda: len(server.server_state.connections) == 2)
        answer = await asyncio.to_thread(exchange, address)
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        assert answer.headers["retry-after"]
        for raw in held:
            raw.close()
        await until(lambda: not server.server_state.connections)
        assert (await asyncio.to_thread(exchange, address, HEAD + b"\r\n")).status == 200

    run(scenario, protocol=Narrow)


def test_rubbish_behind_a_head_that_is_refused_is_told_once_and_logged_never(caplog):
    async def scenario(address, server):
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await asyncio.to_thread(exchange, address, head + b"ZZ\r\nrubbish\r\n")
        assert answer.status == 400
        await until(lambda: not server.server_state.tasks)

    run(scenario)
    assert "Exception" not in caplog.text


class Slow:
    """An application that answers when its client has gone, or the test says so."""

    def __init__(self):
        self.began, self.left, self.may_answer = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope, receive, send):
        assert (await receive())["type"] == "http.request"
        leaving = asyncio.ensure_future(receive())
        waiting = asyncio.ensure_future(self.may_answer.wait())
        self.began.set()
        await asyncio.wait((leaving, waiting), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and leaving.result()["type"] == "http.disconnect":
            self.left.set()
        else:
            await answer_ok(scope, receive, send)
        for task in (leaving, waiting):
            task.cancel()


WHOLE = HEAD + b"\r\n"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "ahead",
    [b"\r\n", WHOLE, b"\0rubbish", WHOLE * 20],
    ids=["line end", "request", "rubbish", "requests"],
)
def test_a_hang_up_is_seen_whatever_was_sent_behind_the_request(ahead, reset):
    app = Slow()

    async def scenario(address, server):
        _, writer = await asyncio.open_connection(*address)
        writer.write(WHOLE)
        await app.began.wait()
        for byte in (ahead[:1], ahead[1:]):
            writer.write(byte)
            await asyncio.sleep(0.05)
        assert not app.left.is_set()
        if reset:
            writer.transport.abort()
        writer.close()
        async with asyncio.timeout(5):
            await app.left.wait()

    run(scenario, app=app)


def test_a_line_end_behind_the_last_request_is_no_mistake():
    app = Slow()

    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        await app.began.wait()
        writer.write(b"\r\n")
        await asyncio.sleep(0.05)
        app.may_answer.set()
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()

    run(scenario, app=app)


def test_the_second_of_three_pipelined_requests_can_be_hung_up_on():
    app = Slow()

    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(WHOLE * 3)
        await app.began.wait()
        app.began.clear()
        app.may_answer.set()
        app.may_answer = asyncio.Event()
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await app.began.wait()
        writer.close()
        async with asyncio.timeout(5):
            await app.left.wait()

    run(scenario, app=app)


def test_pipelined_requests_are_answered_and_too_many_are_cut_off():
    app = Slow()

    async def scenario(address, server):
        reader, writer = await asyncio.open_connection(*address)
        app.may_answer.set()
        writer.write(WHOLE * 20)
        for _ in range(20):
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")
        app.may_answer.clear()
        app.began.clear()
        writer.write(WHOLE)
        await app.began.wait()
        with pytest.raises(ConnectionError):  # noqa: PT012 (whichever write notices it)
            while True:
                writer.write(WHOLE * 100)
                await writer.drain()
                await asyncio.sleep(0.001)
        await app.left.wait()

    run(scenario, app=app)


def test_rubbish_after_an_answer_closes_without_noise(caplog):
    chunked = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

    def rubbish(address):
        with socket.create_connection(address, timeout=5) as raw:
            raw.sendall(chunked)
            status = receive(raw).status
            raw.sendall(b"rubbish\r\n")
            with contextlib.suppress(ConnectionError):
                return status, raw.recv(1)
        return status, b""

    async def scenario(address, server):
        assert await asyncio.to_thread(rubbish, address) == (200, b"")

    run(scenario)
    assert "Fatal error" not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("declares", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_408(monkeypatch, declares):
    monkeypatch.setattr("serving.api.refusal._LINGER_S", 0.05)
    app = BodyLimit(answer_ok, max_bytes=10, max_total_bytes=15, timeout_s=0.1)

    async def scenario(address, server):
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + declares + b"\r\n\r\n"
        answer = await asyncio.to_thread(exchange, address, head)
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")

    run(scenario, app=app)


def test_large_bodies_that_are_withheld_are_bounded_in_sum(monkeypatch):
    monkeypatch.setattr("serving.api.refusal._LINGER_S", 0.05)
    monkeypatch.setattr("serving.api.body_limit._SMALL_BYTES", 4)
    app = BodyLimit(answer_ok, max_bytes=10, max_total_bytes=15, timeout_s=0.3)

    async def scenario(address, server):
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        first, second = await asyncio.gather(
            *(asyncio.to_thread(exchange, address, head + b"12345678") for _ in range(2))
        )
        assert sorted([first.status, second.status]) == [408, 503]
        refused = first if first.status == 503 else second
        assert refused.error["code"] == "queue_full"
        whole = await asyncio.to_thread(exchange, address, head + b"123456789")
        assert whole.status == 200, "what was given up counts no more"
        small = (exchange, address, head + b"1234")
        found = await asyncio.gather(*(asyncio.to_thread(*small) for _ in range(5)))
        assert {answer.status for answer in found} == {408}, "a small one waits for its end"

    run(scenario, app=app)


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(256, 1024, 1024), (256, 20_000, 8320), (9000, 20_000, 9000), (-1, -1, -1), (256, -1, 8320)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch, soft, hard, raised):
    limits = {resource.RLIMIT_NOFILE: (soft, hard)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    raise_file_limit()
    assert limits[resource.RLIMIT_NOFILE] == (raised, hard)


@pytest.mark.parametrize(
    ("limit", "num_clients"), [(144, 16), (1024, 896), (1280, None), (-1, None)]
)
def test_too_few_open_files_for_the_streams_are_said_once(monkeypatch, caplog, limit, num_clients):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    check_file_limit(1152)
    if num_clients is None:
        assert not caplog.messages
    else:
        (line,) = caplog.messages
        assert f"{limit} files: {num_clients} clients can connect, fewer than the 1152" in line


def test_a_limit_of_open_files_that_leaves_none_for_clients_is_the_users(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="may open 40 files"):
        check_file_limit(1152)
