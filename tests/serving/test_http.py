"""The HTTP contract beyond openai-python: bounds, disconnects, drain, operators' routes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.serving.servers import running_server


@pytest.fixture(scope="module")
def server():
    with running_server("--fake") as server:
        yield server


def connect(server):
    return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)


def call(server, method, path, body=None, headers=None):
    connection = connect(server)
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    payload = response.read()
    connection.close()
    return response, payload


def metric(server, name):
    page = call(server, "GET", "/metrics")[1].decode()
    values = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)]
    return sum(values)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


LONG = {"model": "fake", "prompt": "a", "max_tokens": 5000, "ignore_eos": True}


def test_operators_routes(server):
    assert call(server, "GET", "/health")[0].status == 200
    response, payload = call(server, "GET", "/ready")
    assert (response.status, json.loads(payload)) == (200, {"status": "ready"})
    response, _ = call(server, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_every_answer_has_a_request_id(server):
    response, _ = call(server, "GET", "/health", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    made = [call(server, "GET", "/health")[0].headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in made)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/completions", "{", 400, "invalid_value"),
        ("POST", "/v1/completions", "[]", 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": 3}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": "x", "temperature": 1e999}, 400, "invalid_value"),
        ("POST", "/v1/completions", '{"prompt": "\\ud800"}', 400, "invalid_value"),
        (
            "POST",
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            400,
            "invalid_value",
        ),
        (
            "POST",
            "/v1/completions",
            '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
            400,
            "invalid_value",
        ),
        ("POST", "/v1/completions", {"prompt": "x", "top_k": 2**63}, 400, "invalid_value"),
        (
            "POST",
            "/v1/completions",
            {"prompt": "x", "stop_token_ids": [2**64]},
            400,
            "invalid_value",
        ),
        ("POST", "/v1/completions", {"prompt": [2**64]}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": "x", "max_tokens": -(2**70)}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": "x", "seed": 2**64}, 400, "invalid_value"),
        ("POST", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/v1/completions", None, 405, "method_not_allowed"),
        ("POST", "/v1/completions", "x" * ((1 << 20) + 1), 413, "request_too_large"),
    ],
)
def test_bad_requests_get_the_error_object(server, method, path, body, status, code):
    response, payload = call(server, method, path, body)
    error = json.loads(payload)["error"]
    assert (response.status, error["code"]) == (status, code)
    assert error["message"]
    assert len(payload) < 2000, "a small or bad body must not make a large answer"


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**31 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 2**53, "stop_token_ids": list(range(32))},
        {"temperature": 2, "top_p": 5e-324, "min_p": 1},
        {"temperature": 1e-300},
        {"stop_token_ids": [2**31 - 1]},
    ],
)
def test_extreme_but_legal_values_are_served(server, extreme):
    response, _ = call(
        server, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2} | extreme
    )
    assert response.status == 200
    assert call(server, "GET", "/ready")[0].status == 200


def test_a_body_that_hides_its_size_is_cut_off(server):
    def pieces():
        for _ in range(40):
            yield b" " * 65536

    connection = connect(server)
    try:
        connection.request(
            "POST", "/v1/completions", pieces(), {"Content-Type": "application/json"},
            encode_chunked=True,
        )  # fmt: skip
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was refused while the body was still being sent
    finally:
        connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server, stream):
    before = metric(
        server, 'hocket_requests_total{endpoint="completions",model="fake",outcome="abort"}'
    )
    host, port = urlsplit(server.url).netloc.split(":")
    body = json.dumps(LONG | {"stream": stream}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_until(lambda: metric(server, "hocket_requests_running") == 1)
    wait_until(
        lambda: (
            metric(
                server, 'hocket_requests_total{endpoint="completions",model="fake",outcome="abort"}'
            )
            == before + 1
        )
    )
    wait_until(lambda: metric(server, "hocket_requests_running") == 0)
    wait_until(lambda: metric(server, "hocket_kv_cache_usage_ratio") == 0)


def test_metrics_count_what_was_served(server):
    names = ("hocket_generation_tokens_total", "hocket_prompt_tokens_total", "hocket_steps_total")
    before = [metric(server, name) for name in names]
    body = {"prompt": "abcd", "max_tokens": 6, "ignore_eos": True}
    assert call(server, "POST", "/v1/completions", body)[0].status == 200
    generated, prompt, steps = (
        metric(server, name) - old for name, old in zip(names, before, strict=True)
    )
    assert (generated, prompt, steps) == (6, 4, 6)


def test_the_queue_is_bounded_and_says_when_to_come_back():
    with running_server("--fake", "--max-num-running", "1", "--max-num-waiting", "1") as server:
        connections = [connect(server) for _ in range(2)]
        for connection in connections:
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(LONG),
                {"Content-Type": "application/json"},
            )
        wait_until(lambda: metric(server, "hocket_requests_waiting{") == 1)
        response, payload = call(server, "POST", "/v1/completions", LONG)
        assert response.status == 503
        assert json.loads(payload)["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) > 0
        assert response.headers["x-should-retry"] == "true"
        assert call(server, "GET", "/health")[0].status == 200
        for connection in connections:
            connection.close()


def test_sigterm_lets_running_requests_end_and_refuses_new_ones():
    with running_server("--fake") as server:
        answers = []

        def ask():
            answers.append(call(server, "POST", "/v1/completions", LONG | {"max_tokens": 200}))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: metric(server, "hocket_requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: call(server, "GET", "/ready")[0].status == 503)
        response, payload = call(server, "POST", "/v1/completions", LONG)
        assert (response.status, json.loads(payload)["error"]["code"]) == (503, "draining")
        thread.join(timeout=30)
        ((response, payload),) = answers
        assert response.status == 200
        assert json.loads(payload)["usage"]["completion_tokens"] == 200
        assert server.process.wait(timeout=30) == 0


def test_what_outlives_the_drain_is_told_so():
    with running_server("--fake", "--drain-timeout", "0.2") as server:
        connection = connect(server)
        connection.request(
            "POST", "/v1/completions", json.dumps(LONG | {"stream": True}),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        response = connection.getresponse()
        response.readline()
        assert server.terminate() == 1
        *_, error, _, done, _, _ = response.read().split(b"\n")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "draining"
        assert done == b"data: [DONE]"
        connection.close()


def test_the_ready_block_says_what_to_type_next(server):
    block = server.block
    for words in ("Hocket is ready", "Capacity", "Limits", "Started in", "curl http://127.0.0.1:"):
        assert words in block
