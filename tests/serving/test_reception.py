"""The data plane's door: whose call is whose, and that strangers disturb nobody."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from serving.cluster.hosts.frames import frame
from serving.cluster.ray import reception
from serving.cluster.ray.certificates import Authority
from serving.cluster.ray.messages import COMMANDS, OUTPUT, Hello, encode
from serving.cluster.ray.reception import Reception
from serving.cluster.ray.tls_context import DRIVER, driver_context, instance_context
from serving.errors import UserError
from serving.version import version


class Received(asyncio.Protocol):
    def __init__(self):
        self.data = b""
        self.is_closed = asyncio.Event()

    def data_received(self, data):
        self.data += data

    def connection_lost(self, exc):
        self.is_closed.set()


class Door:
    """A reception, and how to knock."""

    def __init__(self, reception, connect):
        self.reception = reception
        self._connect = connect
        self._writers = []

    async def connect(self):
        reader, writer = await self._connect()
        self._writers.append(writer)
        return reader, writer

    async def close(self):
        self.reception.close()
        for writer in self._writers:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    def hello(self, expected, channel, **changes):
        hello = Hello(
            name=expected.name,
            secret=expected.secret,
            channel=channel,
            version=version(),
            pid=os.getpid(),
        )
        return frame(encode(msgspec.structs.replace(hello, **changes)))

    async def says(self, data):
        reader, writer = await self.connect()
        writer.write(data)
        return reader, writer

    async def is_served(self):
        expected = self.reception.expect("honest")
        for channel in (OUTPUT, COMMANDS):
            await self.says(self.hello(expected, channel) + b"rest")
        async with asyncio.timeout(5):
            calls = await expected.all_calls()
        for call in calls:
            received = Received()
            call.hand_over(received)
            async with asyncio.timeout(5):
                while received.data != b"rest":  # noqa: ASYNC110 (it comes by itself)
                    await asyncio.sleep(0.001)
            call.transport.abort()
        self.reception.forget(expected)
        return calls


async def is_cut_off(reader):
    async with asyncio.timeout(5):
        with suppress(ConnectionError):
            assert await reader.read() == b""


@asynccontextmanager
async def local_door(folder):
    reception = Reception()
    await reception.open_local(folder / "data")
    door = Door(reception, lambda: asyncio.open_unix_connection(str(folder / "data")))
    try:
        yield door
    finally:
        await door.close()


@asynccontextmanager
async def remote_door(folder):
    authority, reception = Authority(), Reception()
    port = await reception.open_remote("127.0.0.1", driver_context(authority.for_driver()))
    context = instance_context(authority.for_instance())

    def connect():
        return asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=DRIVER)

    door = Door(reception, connect)
    try:
        yield door
    finally:
        await door.close()


@pytest.fixture(params=[local_door, remote_door], ids=["local", "remote"])
def opened(request, tmp_path):
    def run(scenario):
        async def opened():
            async with request.param(tmp_path) as door:
                await scenario(door)
                assert await door.is_served()
                assert not door.reception._strangers

        asyncio.run(opened())

    return run


def test_who_is_expected_is_let_in_and_known(tmp_path):
    async def run():
        async with local_door(tmp_path) as door:
            calls = await door.is_served()
            assert [(call.pid, call.node) for call in calls] == [(os.getpid(), None)] * 2

    asyncio.run(run())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\0\0\1\xc1",
        b"\0\0\0\1\x80",
        frame(b"\x80" * 1025),
    ],
)
def test_garbage_is_cut_off(opened, data):
    async def scenario(door):
        reader, _ = await door.says(data)
        await is_cut_off(reader)

    opened(scenario)


@pytest.mark.parametrize(
    "changes", [{"secret": "wrong"}, {"name": "another"}, {"channel": "third"}, {"secret": ""}]
)
def test_a_hello_that_is_nobodys_is_cut_off(opened, changes):
    async def scenario(door):
        expected = door.reception.expect("one")
        reader, _ = await door.says(door.hello(expected, **{"channel": COMMANDS, **changes}))
        await is_cut_off(reader)
        assert not any(call.done() for call in expected.calls.values())

    opened(scenario)


def test_a_secret_is_good_once_and_only_while_it_is_awaited(opened):
    async def scenario(door):
        expected = door.reception.expect("one")
        await door.says(door.hello(expected, COMMANDS))
        await asyncio.wait_for(asyncio.shield(expected.calls[COMMANDS]), 5)
        reader, _ = await door.says(door.hello(expected, COMMANDS))
        await is_cut_off(reader)
        door.reception.forget(expected)
        reader, _ = await door.says(door.hello(expected, OUTPUT))
        await is_cut_off(reader)
        expected.close()

    opened(scenario)


def test_another_version_is_refused_by_name(opened):
    async def scenario(door):
        expected = door.reception.expect("one")
        await door.says(door.hello(expected, COMMANDS, version="0.0.1"))
        with pytest.raises(UserError, match=rf"has hocket 0\.0\.1, this server {version()}"):
            await asyncio.wait_for(expected.all_calls(), 5)

    opened(scenario)


def test_who_says_nothing_is_cut_off(opened, monkeypatch):
    monkeypatch.setattr(reception, "_HELLO_S", 0.05)

    async def scenario(door):
        for said in (b"", b"\0", b"\0\0\0\x50half"):
            reader, _ = await door.says(said)
            await is_cut_off(reader)
        monkeypatch.undo()

    opened(scenario)


def test_of_many_strangers_the_first_has_to_go(opened, monkeypatch):
    monkeypatch.setattr(reception, "_MAX_NUM_STRANGERS", 4)

    async def scenario(door):
        silent = [await door.connect() for _ in range(8)]
        for reader, _ in silent[:4]:
            await is_cut_off(reader)
        assert await door.is_served()
        for _, writer in silent:
            writer.transport.abort()
        async with asyncio.timeout(5):
            while door.reception._strangers:  # noqa: ASYNC110 (they go by themselves)
                await asyncio.sleep(0.001)

    opened(scenario)


@pytest.mark.parametrize("kind", ["none", "of another session", "no TLS"])
def test_a_caller_without_our_certificate_is_refused(tmp_path, kind):
    contexts = {
        "none": ssl.create_default_context(),
        "of another session": instance_context(Authority().for_instance()),
        "no TLS": None,
    }
    context = contexts[kind]
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def run():
        async with remote_door(tmp_path) as door:
            port = door.reception._server.sockets[0].getsockname()[1]
            expected = door.reception.expect("one")
            data = door.hello(expected, COMMANDS)
            answer = await asyncio.to_thread(answer_to, port, context, data)
            assert answer == b""
            assert not expected.calls[COMMANDS].done()
            assert await door.is_served()

    asyncio.run(run())


def answer_to(port, context, data):
    """Send this as a stranger; return what comes back before it is cut off."""
    connection = socket.create_connection(("127.0.0.1", port), 10)
    try:
        if context is not None:
            connection = context.wrap_socket(connection)
        connection.sendall(data)
        return connection.recv(100)
    except (ssl.SSLError, ConnectionError):
        return b""
    finally:
        connection.close()


def test_a_driver_with_another_certificate_is_not_called(tmp_path):
    """An instance talks to its own driver alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    impostor = driver_context(Authority().for_driver())

    def serve():
        with suppress(OSError), listener, listener.accept()[0] as connection:
            impostor.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    context = instance_context(Authority().for_instance())
    with (
        socket.create_connection(listener.getsockname(), 10) as connection,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(connection, server_hostname=DRIVER)
    thread.join()
