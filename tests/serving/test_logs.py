"""The log: one line an event, harmless and without the words of clients; when it speaks."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import logging
import socket
from urllib.parse import urlsplit

import pytest

from serving import logs, status
from serving.metrics import Metrics, Totals
from serving.status import status_fields
from tests.serving.scripted import Script, Server, encode, says
from tests.serving.servers import running_server

EVIL = 'a"b\nWARNING forged\r\x1b[31mred\x1b[0m\u2028\x00\u202e é 日本'


@pytest.fixture
def log():
    """Return a function that starts to log into a text; what was there before comes back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    text = io.StringIO()

    def start(**settings):
        logs.configure(**{"as_json": False, "level": "info"} | settings, stream=text)
        return text

    yield start
    root.handlers[:] = handlers
    root.setLevel(level)


def say(level=logging.INFO, **fields):
    logs.event(logging.getLogger("serving.test"), level, "happened", **fields)


def test_an_event_is_a_line_of_words(log):
    text = log()
    say(request_id="r1", num=3, share=0.25, left_out=None, note="two words")
    (line,) = text.getvalue().splitlines()
    assert line.endswith('INFO    happened request_id=r1 num=3 share=0.25 note="two words"')
    assert line[10] == "T"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_comes_from_outside_cannot_end_a_line_or_speak_to_a_terminal(log, as_json):
    text = log(as_json=as_json)
    say(given=EVIL)
    logging.getLogger("uvicorn.error").warning("odd %s", EVIL)
    written = text.getvalue()
    assert written.count("\n") == 2
    assert len(written.splitlines()) == 2
    assert all(char.isprintable() or char == "\n" for char in written)
    assert "日本" in written


def test_a_long_field_is_cut(log):
    text = log()
    say(given="x" * 1_000_000)
    assert len(text.getvalue()) < 3000


def test_json_lines_carry_fields_and_failures(log):
    text = log(as_json=True)
    say(request_id="r1", num=3)
    try:
        raise ValueError("canary")
    except ValueError:
        logging.getLogger("serving.test").exception("broke")
    first, second = map(json.loads, text.getvalue().splitlines())
    assert first["message"] == "happened"
    assert (first["level"], first["request_id"], first["num"]) == ("info", "r1", 3)
    assert second["error"] == "ValueError"
    assert "test_logs.py" in second["frames"][-1]


@pytest.mark.parametrize(("level", "is_shown"), [("info", False), ("debug", True)])
def test_the_message_of_an_exception_is_for_debug(log, level, is_shown):
    text = log(level=level)
    try:
        try:
            raise KeyError("canary")
        except KeyError as error:
            raise ValueError("canary too") from error
    except ValueError:
        logging.getLogger("serving.test").exception("broke")
    assert "ValueError" in text.getvalue()
    assert "KeyError" in text.getvalue()
    assert ("canary" in text.getvalue()) is is_shown


# --- what a server writes ---


def serve(scenario, script):
    async def served():
        async with Server(script) as server:
            await scenario(server)

    asyncio.run(served())


CANARY = "canary-9313"


def test_no_prompt_and_no_output_is_in_the_log_at_any_level(log):
    text = log(level="debug")

    async def scenario(server):
        assert CANARY in (await server.complete(prompt=CANARY, max_tokens=20)).text
        await server.chat(messages=[{"role": "user", "content": CANARY}], stream=True)
        await server.complete(prompt="x", temperature=CANARY)
        await server.get(f"/v1/models/{CANARY}")
        await server.get(f"/{CANARY}?{CANARY}")

    serve(scenario, says(CANARY))
    written = text.getvalue()
    assert CANARY not in written
    assert str(encode(CANARY))[1:-1] not in written
    assert written.count(" answered ") == 5
    assert written.count(" ended ") == 2
    assert "route=/v1/chat/completions" in written


def test_at_info_only_failures_have_a_line(log):
    text = log()

    async def scenario(server):
        await server.complete(prompt="y")
        await server.complete(prompt="x")
        await server.complete(prompt=3)

    def script(spec):
        return Script(
            encode("ab"), error="nan" if spec.prompt_token_ids == (encode("x")[0],) else None
        )

    serve(scenario, script)
    failed, answered = text.getvalue().splitlines()
    assert "a request failed in the model" in failed
    assert "status=500" in answered
    request_id = answered.partition("request_id=")[2].split()[0]
    assert f"request_id={request_id}-0" in failed


def test_a_server_with_log_json_writes_nothing_else():
    with running_server("--fake", "--log-json", "--log-level", "debug") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as peer:
            peer.sendall(b"no\x1b[31mHTTP " + CANARY.encode() + b"\r\n\r\n")
            assert b"400" in peer.recv(100)
        connection = http.client.HTTPConnection(address.netloc, timeout=10)
        headers = {"Authorization": f"Bearer {CANARY}", "X-Request-Id": "mine"}
        connection.request(
            "POST", f"/v1/completions?{CANARY}", f'{{"prompt": "{CANARY}"}}', headers
        )
        assert connection.getresponse().read()
        connection.close()
        assert server.terminate() == 0
        written = server.process.stderr.read()
    documents = [json.loads(line) for line in written.splitlines()]
    messages = [document["message"] for document in documents]
    assert messages[0] == "starting"
    assert CANARY not in written
    (answered,) = [document for document in documents if document["message"] == "answered"]
    assert answered["client_request_id"] == "mine"
    assert {document["level"] for document in documents} <= {"debug", "info", "warning"}


# --- the status line ---


def totals(**changes):
    names = Totals.__dataclass_fields__
    return Totals(**dict.fromkeys(names, 0) | changes)


def test_the_status_is_of_the_time_between():
    before = totals(num_prompt_tokens=100, num_prefix_queries=100, num_prefix_hits=50)
    after = totals(
        num_prompt_tokens=300, num_generation_tokens=50, num_prefix_queries=300,
        num_prefix_hits=100, num_running=2, num_waiting=1, kv_usage=0.1234,
    )  # fmt: skip
    assert status_fields(before, after, 10.0) == {
        "prompt_tokens_per_s": 20.0,
        "generation_tokens_per_s": 5.0,
        "running": 2,
        "waiting": 1,
        "kv_usage_percent": 12.3,
        "prefix_hit_percent": 25.0,
        "rejected": None,
        "preempted": None,
    }


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [
        ({}, False),
        ({"num_running": 1}, True),
        ({"num_waiting": 1}, True),
        ({"num_generation_tokens": 1}, True),
        ({"num_rejections": 1}, True),
    ],
)
def test_an_idle_server_says_nothing(changes, speaks):
    assert (status_fields(totals(), totals(**changes), 10.0) is not None) is speaks


def test_the_line_comes_while_there_is_work_and_once_after_it(log):
    text = log()

    async def scenario():
        metrics = Metrics("m")
        watcher = asyncio.create_task(status.report_status(metrics, period_s=0.01))
        await asyncio.sleep(0.05)
        assert not text.getvalue()
        metrics.next_tokens([0.1])
        await asyncio.sleep(0.1)
        watcher.cancel()

    asyncio.run(scenario())
    (line,) = text.getvalue().splitlines()
    assert " status prompt_tokens_per_s=0 generation_tokens_per_s=" in line


def test_the_lag_of_a_busy_loop_is_seen():
    lags_s = []

    async def scenario():
        watcher = asyncio.create_task(status.watch_event_loop(lags_s.append))
        await asyncio.sleep(0)
        import time

        time.sleep(0.4)  # noqa: ASYNC251 (this is what is to be seen)
        await asyncio.sleep(0.01)
        watcher.cancel()

    asyncio.run(scenario())
    assert lags_s
    assert max(lags_s) >= 0.1
