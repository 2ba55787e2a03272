"""A server that is full, clients that read slowly or leave, streams that are silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import time
from urllib.parse import urlsplit

from serving.connections import set_options
from serving.listener import bind
from tests.bench.disconnects import FLAGS, settle, storm
from tests.serving.servers import running_server
from tests.serving.test_http import LONG, call, connect, metric, wait_until

ONE_AT_A_TIME = ("--fake", "--max-num-running", "1")


def post(server, body, headers=None):
    """Send a request and return its connection, without waiting for an answer."""
    connection = connect(server)
    headers = {"Content-Type": "application/json", **(headers or {})}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


@contextlib.contextmanager
def busy(server, headers=None):
    """Someone holds a place."""
    connection = post(server, LONG, headers)
    wait_until(lambda: metric(server, "hocket_requests_running") == 1)
    try:
        yield
    finally:
        connection.close()


def refusals(server):
    """Return how many were refused, by the reason that is counted."""
    page = call(server, "GET", "/metrics")[1].decode()
    found = re.findall(r'(?m)^hocket_request_rejections_total{.*reason="(\w+)".*} (\S+)$', page)
    return {reason: float(num) for reason, num in found if float(num)}


def test_connections_inherit_what_bounds_them():
    for timeout_s, expected_ms in ((30.0, 30_000), (math.inf, 2_000_000_000)):
        with bind("127.0.0.1", 0) as listener:
            set_options(listener, timeout_s)
            listener.listen()
            with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
                found_ms = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert found_ms == expected_ms


def test_a_full_server_refuses_before_it_reads_what_is_asked():
    with running_server(*ONE_AT_A_TIME, "--max-num-waiting", "0") as server, busy(server):
        response, payload = call(server, "POST", "/v1/completions", "{no JSON")
        assert response.status == 503
        assert json.loads(payload)["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"]
        assert refusals(server) == {"requests": 1}
        assert call(server, "GET", "/ready")[0].status == 200, "full is not ill"


def test_a_tenant_at_its_share_is_told_429_and_others_go_on():
    keys = {tenant: f"{tenant}-0123456789abcdef" for tenant in ("greedy", "modest")}
    environ = {"HOCKET_API_KEYS": ",".join(f"{tenant}: {key}" for tenant, key in keys.items())}
    greedy, modest = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    bounds = ("--max-num-streams", "4", "--tenant-share", "0.25")
    with running_server("--fake", *bounds, env=environ) as server, busy(server, greedy):
        for body in (LONG, LONG | {"stream": True}):
            response, payload = call(server, "POST", "/v1/completions", body, greedy)
            error = json.loads(payload)["error"]
            assert (response.status, error["code"]) == (429, "rate_limit_exceeded")
            assert error["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-should-retry"] == "true"
        body = LONG | {"max_tokens": 2}
        assert call(server, "POST", "/v1/completions", body, modest)[0].status == 200
        assert call(server, "POST", "/v1/completions", body)[0].status == 401, "before its share"
        assert refusals(server) == {"tenant_streams": 2}


def test_whoever_waited_too_long_is_refused_and_what_runs_goes_on():
    with running_server(*ONE_AT_A_TIME, "--max-queue-age", "0.3") as server, busy(server):
        waiting = [post(server, LONG | {"stream": stream}) for stream in (True, False)]
        for connection in waiting:
            response = connection.getresponse()
            assert response.status == 503, "also a stream, as nothing of it was sent"
            assert json.loads(response.read())["error"]["code"] == "queue_timeout"
            assert response.headers["x-should-retry"] == "true"
            connection.close()
        assert metric(server, "hocket_requests_running") == 1
        wait_until(lambda: metric(server, "hocket_requests_waiting{") == 0)
        assert refusals(server) == {"queue_timeout": 2}
        assert (
            metric(
                server,
                'hocket_requests_total{endpoint="completions",model="fake",outcome="rejected"}',
            )
            == 2
        )


def test_silent_streams_are_kept_alive_between_events():
    with running_server(*ONE_AT_A_TIME, "--sse-keep-alive", "0.15") as server:
        with busy(server):
            connection = post(server, LONG | {"stream": True, "max_tokens": 3})
            response = connection.getresponse()
            assert response.status == 200
            assert [response.readline() for _ in range(4)] == [b": keep-alive\n", b"\n"] * 2
        *blocks, nothing = response.read().decode().split("\n\n")
        events = [block for block in blocks if block != ": keep-alive"]
        assert nothing == ""
        assert events[-1] == "data: [DONE]"
        assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])
        connection.close()


def test_a_client_that_reads_slowly_loses_its_stream_and_others_do_not():
    with running_server("--fake", "--slow-client-timeout", "0.5") as server:
        host, port = urlsplit(server.url).netloc.split(":")
        body = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 5}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            wait_until(lambda: metric(server, "hocket_requests_running") == 8)
            other = post(server, LONG | {"stream": True, "max_tokens": 200})
            response = other.getresponse()
            deadline_s = time.monotonic() + 20
            while metric(server, "hocket_requests_running") > 1:
                assert time.monotonic() < deadline_s, "its requests go on"
                with contextlib.suppress(ConnectionError):
                    slow.recv(1)
                time.sleep(0.1)
            assert response.read().endswith(b"data: [DONE]\n\n")
            other.close()
            with contextlib.suppress(ConnectionError):  # what was under way, then the end
                while slow.recv(1 << 16):
                    pass
        wait_until(lambda: metric(server, "hocket_kv_cache_usage_ratio") == 0)


def test_clients_that_leave_at_any_moment_leave_nothing_behind():
    with running_server("--fake", *FLAGS) as server:
        seen = asyncio.run(storm(server.url, 40, seed=1, longest_s=2.0))
        found, num_steps, _ = settle(server)
        assert not found
        assert num_steps <= 2
        assert sum(seen.values()) == 40
        assert len(seen) >= 3, f"they left in different phases: {seen}"
        assert any("behind" in phase for phase in seen)
        assert call(server, "POST", "/v1/completions", LONG | {"max_tokens": 2})[0].status == 200
