"""The client against real sockets: a mock server, and servers that break off, lie or are gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey

from loadgen.mock import MockConfig, MockServer
from loadgen.runner import Progress, play
from loadgen.target import Message, OpenAITarget, Outgoing, served_model
from loadgen.types import LoadError, Record, Session, Turn


def connector_error(number: int) -> aiohttp.ClientConnectorError:
    key = ConnectionKey("127.0.0.1", 9, False, True, None, None, None)
    return aiohttp.ClientConnectorError(key, OSError(number, os.strerror(number)))


def with_server(app, talk):
    """Serve `app` on a free port of loopback and return what `talk(url)` returns."""

    async def main():
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            return await talk(f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    return asyncio.run(main())


async def sent(url, *, prompt="hello", max_tokens=4, **settings) -> Record:
    record = Record(session=0, turn=0, tenant="t", intended_at_s=0.0)
    zero_s = asyncio.get_running_loop().time()
    async with OpenAITarget(url=url, model="mock", **settings) as target:
        await target.send(Outgoing(prompt=prompt, max_tokens=max_tokens), record, zero_s)
    return record


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_an_answer_is_recorded_as_the_server_sent_it(endpoint):
    server = MockServer(MockConfig(ttft_ms=20, itl_ms=10))

    async def talk(url):
        assert await served_model(url, "") == "mock"
        return await sent(url, endpoint=endpoint, prompt="three words here")

    record = with_server(server.app, talk)
    assert (record.error, record.finish_reason) == ("", "length")
    assert record.text == " word" * 4
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 4)
    assert len(record.received_at_s) == len(record.stamped_at_s) == 4
    pairs = zip(record.stamped_at_s, record.received_at_s, strict=True)
    assert all(stamped <= received for stamped, received in pairs)
    assert record.stamped_at_s[0] >= record.sent_at_s + 0.02
    assert min(record.gaps_s) >= 0
    assert record.end_at_s >= record.received_at_s[-1]


def test_the_mock_tells_its_latencies_to_clients_that_read_no_stamps():
    server = MockServer(MockConfig(ttft_ms=20, itl_ms=5))

    async def talk(url):
        record = await sent(url, max_tokens=8)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/stamps") as answer:
            return record, await answer.json()

    record, stamps = with_server(server.app, talk)
    assert {name: stamp["num"] for name, stamp in stamps.items()} == {
        "ttft": 1,
        "itl": 7,
        "tpot": 1,
    }
    assert stamps["ttft"]["p50_s"] >= 0.02
    assert stamps["itl"]["p50_s"] == pytest.approx(
        np.median(np.diff(record.stamped_at_s)), abs=2e-9
    )
    assert stamps["itl"]["p99_s"] is None, "seven samples"


def test_many_requests_at_once_each_get_their_own_answer():
    server = MockServer(MockConfig(ttft_ms=10, itl_ms=1))
    plan = tuple(
        Session(start_at_s=0.0, turns=(Turn(prompt="x", max_tokens=1 + n % 7),)) for n in range(200)
    )

    async def talk(url):
        progress = Progress(len(plan))
        async with OpenAITarget(url=url, model="mock") as target:
            await play(plan, target, asyncio.Event(), progress, None)
        return progress

    progress = with_server(server.app, talk)
    assert server.num_requests == 200
    assert [len(record.received_at_s) for record in progress.records] == [
        1 + n % 7 for n in range(200)
    ]
    assert not any(record.error for record in progress.records)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (MockConfig(error_rate=1.0, error_status=429), "http_429"),
        (MockConfig(disconnect_rate=1.0), "disconnected"),
        (MockConfig(ttft_ms=1000), "timeout"),
    ],
)
def test_failures_have_a_class(config, error):
    record = with_server(MockServer(config).app, lambda url: sent(url, timeout_s=0.3))
    assert record.error == error
    assert record.detail
    assert record.end_at_s > 0


def app_that_says(*chunks: bytes, content_type: str = "text/event-stream") -> web.Application:
    async def answer(request):
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def test_what_other_servers_say_is_understood():
    said = app_that_says(
        b": keep-alive\r\n\r\n",
        event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
        event(choices=[{"index": 0, "delta": {"reasoning_content": "hm"}}], usage=None),
        event(choices=[{"index": 0, "delta": {"content": "Hel"}}])[:-9],
        event(choices=[{"index": 0, "delta": {"content": "Hel"}}])[-9:],
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        event(
            choices=[],
            usage={
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 8},
            },
        ),
        b"data: [DONE]\n\n",
    )
    record = with_server(said, sent)
    assert (record.text, record.finish_reason, record.error) == ("hmHel", "stop", "")
    assert len(record.received_at_s) == 2, "an event without text is no token"
    counted = (record.num_prompt_tokens, record.num_cached_tokens, record.num_output_tokens)
    assert counted == (9, 8, 5)


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([event(choices=[{"text": "a"}])], "disconnected"),
        ([event(error={"message": "out of memory"}), b"data: [DONE]\n\n"], "stream_error"),
        ([b"data: {never json\n\n"], "bad_answer"),
        ([b'data: {"choices": 3}\n\n'], "bad_answer"),
    ],
)
def test_answers_that_are_none_are_errors(chunks, error):
    assert with_server(app_that_says(*chunks), sent).error == error


@pytest.mark.parametrize(
    ("chunks", "error", "said"),
    [
        ([b"<html>\n\n<p>\x1b[2J\xe2\x80\xaeno</html>"], "bad_answer", "<p> [2J no</html>"),
        ([b'{"choices": [{"text": "a"}]}'], "bad_answer", '{"choices": [{"text": "a"}]}'),
        ([b": alive\n\n"], "disconnected", "just ended"),
        ([], "disconnected", "just ended"),
        ([event(choices=[{"text": "a"}]), b"<html>"], "disconnected", "just ended"),
        ([b'data: {"error": ' + b"[" * 2000 + b"]" * 2000 + b"}\n\n"], "bad_answer", "Recursion"),
        ([event(error="\x1b]0;x\x07 \u202egone")], "stream_error", "gone"),
    ],
)
def test_what_is_no_stream_is_shown_as_it_begins_and_cannot_steer(chunks, error, said):
    record = with_server(app_that_says(*chunks), sent)
    assert record.error == error
    assert said in record.detail
    assert record.detail.isprintable()


def test_numbers_that_cannot_be_are_not_taken_for_facts():
    counted = {"prompt_tokens": -5, "completion_tokens": 10**30}
    wild = event(choices=[{"text": "a"}], usage=counted, sent_ns=10**30)
    record = with_server(app_that_says(wild, b"data: [DONE]\n\n"), sent)
    assert (record.num_prompt_tokens, record.num_cached_tokens) == (0, None)
    assert (record.error, record.stamped_at_s) == ("", [])
    assert float(record.num_output_tokens) == 1 << 40


def app_that_fails(body: bytes, content_type: str) -> web.Application:
    async def answer(_):
        return web.Response(status=500, body=body, headers={"content-type": content_type})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def test_errors_in_any_bytes_are_read():
    app = app_that_fails(b"\xff\xfe out of memory \x1b[2J", "text/plain; charset=base64")
    record = with_server(app, sent)
    assert record.error == "http_500"
    assert "out of memory" in record.detail
    app = app_that_fails(b"\xff\x1b[2J\x07\xe2\x80\xae no", "text/plain; charset=base64")
    with pytest.raises(LoadError, match="answered 500") as caught:
        with_server(app, lambda url: served_model(url, ""))
    assert caught.value.cause.isprintable()


def test_no_exception_ends_a_run(monkeypatch):
    def broken(*_):
        raise LookupError("surprise")

    async def talk(url):
        monkeypatch.setattr("loadgen.target._Stream._take", broken)
        return await sent(url)

    record = with_server(app_that_says(event(choices=[])), talk)
    assert (record.error, record.detail) == ("bad_answer", "LookupError: surprise")


def test_a_prompt_that_is_no_text_is_not_the_servers_failure():
    record = asyncio.run(sent("http://127.0.0.1:9", prompt="\ud800"))
    assert record.error == "unsendable"
    assert "surrogates" in record.detail
    assert record.end_at_s == record.sent_at_s > 0


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (aiohttp.ConnectionTimeoutError("host"), "connect_timeout", "within 10 s"),
        (connector_error(errno.EMFILE), "no_descriptors", "Too many open files"),
        (connector_error(errno.ECONNREFUSED), "refused", "refused"),
    ],
)
def test_what_keeps_from_connecting_has_a_class(monkeypatch, raised, error, said):
    async def connect(*_, **__):
        raise raised

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", connect)
    record = asyncio.run(sent("http://127.0.0.1:9"))
    assert record.error == error
    assert said in record.detail


def test_a_full_backlog_is_no_answer_that_took_too_long(monkeypatch):
    monkeypatch.setattr("loadgen.target.CONNECT_S", 0.2)
    with socket.socket() as deaf, contextlib.ExitStack() as others:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(deaf.getsockname())
        record = asyncio.run(sent(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=5))
    assert (record.error, record.detail) == ("connect_timeout", "no connection within 0.2 s")


def test_nobody_there_and_nothing_like_it():
    record = asyncio.run(sent("http://127.0.0.1:9"))
    assert record.error == "refused"
    with pytest.raises(LoadError, match="no server answers"):
        asyncio.run(served_model("http://127.0.0.1:9", ""))
    with pytest.raises(LoadError, match="does not answer as OpenAI's API does"):
        with_server(app_that_says(b"<html>"), lambda url: served_model(url, ""))


def test_a_conversation_is_sent_as_messages_or_as_a_text_that_goes_on():
    said = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    outgoing = Outgoing(prompt=said, max_tokens=1, tenant="gold", priority=2)
    chat = OpenAITarget(url="", model="m", endpoint="chat")._body(outgoing)
    assert [message["content"] for message in chat["messages"]] == ["a", "b", "c"]
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant", "user"]
    text = OpenAITarget(url="", model="m", extra={"top_k": 3}, ignore_eos=False)._body(outgoing)
    assert (text["prompt"], text["priority"], text["top_k"]) == ("ab\n\nc", 2, 3)
    assert "ignore_eos" not in text
    assert text["user"] == "gold"
    ids = OpenAITarget(url="", model="m")._body(Outgoing(prompt=(1, 2), max_tokens=1))
    assert ids["prompt"] == [1, 2]


def test_every_prompt_of_a_conversation_holds_the_answers_before_it():
    """100 conversations of up to five turns at once, against a server that answers uniquely."""
    sent: dict[str, list[str]] = {}  # by first message: all that was said, as sent last

    async def answer(request):
        said = [message["content"] for message in (await request.json())["messages"]]
        before = sent.get(said[0], [])
        assert said[: len(before)] == before
        assert len(said) == len(before) + 1
        spoken = f"answer to {'/'.join(said)}"[-200:]
        sent[said[0]] = [*said, spoken]
        chunk = {"choices": [{"delta": {"content": spoken}, "finish_reason": "stop"}]}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
        return web.Response(body=body, content_type="text/event-stream")

    plan = tuple(
        Session(
            start_at_s=0.0,
            turns=tuple(Turn(prompt=f"{number}, turn {turn}") for turn in range(2 + number % 4)),
        )
        for number in range(100)
    )

    async def talk(url):
        progress = Progress(len(plan))
        async with OpenAITarget(url=url, model="m", endpoint="chat") as target:
            await play(plan, target, asyncio.Event(), progress, None)
        return progress

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    progress = with_server(app, talk)
    assert [record.error for record in progress.records] == [""] * 350
    assert sorted(len(said) // 2 for said in sent.values()) == sorted(len(it.turns) for it in plan)
