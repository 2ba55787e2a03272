"""What a streamed token costs in calls, and that text takes the short way as it would the long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import sys

import pytest

from scheduler.types import FinishedEvent, FinishReason, TokenEvent
from serving.http_server import HttpServer
from serving.listener import bind
from serving.ports import Port, PortRules
from tests.serving import raw
from tests.serving.scripted import ScriptedHandle, Server, encode

# Of Python functions and of built-in ones, as `sys.setprofile` counts them, and a few to spare.
MAX_CALLS_A_TOKEN = 25
HARD = 'a "quote" \\ \n \x01 é 🐦 漢字 </script> \u2028'
PATHS = {"completions": {"prompt": "x"}, "chat/completions": {"messages": [
    {"role": "user", "content": "x"}
]}}  # fmt: skip


@pytest.fixture(autouse=True)
def levels_of_uvicorn(caplog):
    for name in ("uvicorn.error", "uvicorn.access"):  # which it sets for good
        caplog.set_level(logging.ERROR, name)


class SteppedHandle(ScriptedHandle):
    """An instance that says a step's tokens when it is told to."""

    index = 0  # of the next token

    async def _run(self, spec):
        """Say nothing by itself."""

    def step(self, token_id, *, is_last=False):
        """A token for each request, or no more."""
        tokens = [TokenEvent(name, self.index, token_id) for name in self.specs]
        self.index += 1
        ended = [FinishedEvent(name, FinishReason.LENGTH) for name in self.specs if is_last]
        self._step(tokens=tokens, finished=ended)


class Streams:
    """Clients on sockets that nobody reads meanwhile, of a server in this process."""

    def __init__(self, path="completions", **body):
        self._server = Server(None)
        self.handle = self._server.handle = SteppedHandle(None)
        body = PATHS[path] | {"stream": True, "max_tokens": 50} | body
        self._request = raw.request("POST", f"/v1/{path}", json.dumps(body).encode())

    @contextlib.asynccontextmanager
    async def open(self, num):
        """Yield sockets; each stream has had its first token, which was an "a"."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._server)
            listener = stack.enter_context(bind("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            server = HttpServer(Port(listener, PortRules()))
            server.entrance.open(self._server._app)
            await stack.enter_async_context(server.running(lambda: None))
            sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
            for each in sockets:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                each.setblocking(False)
                await asyncio.get_running_loop().sock_connect(each, listener.getsockname())
                each.send(self._request)
            async with asyncio.timeout(20):
                while len(self.handle.specs) < num:  # noqa: ASYNC110 (they come by themselves)
                    await asyncio.sleep(0.005)
            self.handle.step(encode("a")[0])
            await asyncio.sleep(0.05)
            yield sockets

    async def events(self):
        """Answer one client with the hard text, a token a step; return its chunks."""
        async with self.open(1) as (client,):
            *ids, last = encode(HARD)
            for token_id in ids:
                self.handle.step(token_id)
                await asyncio.sleep(0)
            self.handle.step(last, is_last=True)
            await asyncio.sleep(0.05)
            client.setblocking(True)
            body = raw.receive(client).body.decode()
        lines = body.removesuffix("\n\n").split("\n\n")
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Calls:
    """Counts calls while its block runs."""

    def __enter__(self):
        self.num = 0
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, _, event, __):
        self.num += event in ("call", "c_call")


@pytest.mark.parametrize("path", PATHS)
def test_a_token_takes_few_calls_and_no_turn_of_the_loop(path):
    async def calls_of_a_step(num):
        streams = Streams(path)
        async with streams.open(num) as sockets:
            token_id = encode("b")[0]
            for _ in range(5):  # some steps tell the cluster scheduler how far requests are
                streams.handle.step(token_id)
                await asyncio.sleep(0)
            steps, turns = [], []
            for _ in range(4):  # a timer may be due in one of them
                with Calls() as step:
                    streams.handle.step(token_id)
                with Calls() as turn:
                    await asyncio.sleep(0)
                steps.append(step.num)
                turns.append(turn.num)
            received = [each.recv(1 << 16) for each in sockets]
            assert all(data.count(b':"b"') == 9 for data in received)
        return min(steps), min(turns)

    (few, turn), (many, turn_of_many) = (asyncio.run(calls_of_a_step(num)) for num in (8, 40))
    a_token = (many - few) / 32
    assert a_token <= MAX_CALLS_A_TOKEN, f"{a_token} calls a token"
    assert abs(turn_of_many - turn) < 16, "readers are not woken one by one"


@pytest.mark.parametrize("path", PATHS)
def test_the_short_way_says_what_the_long_way_does(path):
    short = asyncio.run(Streams(path).events())
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    long = asyncio.run(Streams(path, **usage).events())[:-1]  # the last is the usage
    for chunk in long:
        del chunk["usage"]
    for chunk in (*short, *long):
        for name in ("id", "created"):
            del chunk[name]
    assert short == long
    assert list(short[1]) == list(long[1])
    choices = [chunk["choices"][0] for chunk in short]
    texts = [
        choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices
    ]
    assert "".join(texts) == "a" + HARD
    assert len(texts) == len(encode(HARD)) + 1


def test_a_client_that_falls_behind_gets_everything_in_order():
    async def scenario():
        streams = Streams()
        async with streams.open(1) as (client,):
            letters = "".join(random.Random(1).choices("bcdefg", k=6_000))
            for token_id in encode(letters):
                streams.handle.step(token_id)
                await asyncio.sleep(0)
            loop, data = asyncio.get_running_loop(), b""
            async with asyncio.timeout(20):
                streams.handle.step(encode("h")[0], is_last=True)
                while not data.endswith(b"0\r\n\r\n"):
                    data += await loop.sock_recv(client, 1 << 16)
        body = data.partition(b"\r\n\r\n")[2]
        chunks = []
        while body:
            size, _, body = body.partition(b"\r\n")
            chunks.append(body[: int(size, 16)])
            body = body[int(size, 16) + 2 :]
        events = b"".join(chunks).decode().split("\n\n")[:-2]
        texts = [json.loads(each.removeprefix("data: "))["choices"][0]["text"] for each in events]
        assert "".join(texts) == "a" + letters + "h"
        assert len(texts) < 6_000, "what it did not read came together"

    asyncio.run(scenario())
