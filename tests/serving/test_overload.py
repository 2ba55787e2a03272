"""A server that is full, clients that read slowly or leave, streams that are silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

from serving.connections import set_options
from tests.bench.disconnects import FLAGS, settle, storm
from tests.serving.servers import running_server
from tests.serving.test_http import LONG, call, connect, metric, wait_until

ONE_AT_A_TIME = ("--fake", "--max-num-running", "1")


def post(server, body):
    """Send a request and return its connection, without waiting for an answer."""
    connection = connect(server)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


@contextlib.contextmanager
def busy(server):
    """Someone holds the only place."""
    connection = post(server, LONG)
    wait_until(lambda: metric(server, "hocket_requests_running") == 1)
    try:
        yield
    finally:
        connection.close()


def test_connections_inherit_what_bounds_them():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        set_options(listener, 30.0)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            values = [
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT)
            ]
    assert values == [1, 30_000], "asyncio does not see that these are TCP, and sets nothing"


def test_a_full_server_refuses_before_it_reads_what_is_asked():
    with running_server(*ONE_AT_A_TIME, "--max-num-waiting", "0") as server, busy(server):
        response, payload = call(server, "POST", "/v1/completions", "{no JSON")
        assert response.status == 503
        assert json.loads(payload)["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"]
        assert call(server, "GET", "/ready")[0].status == 200, "full is not ill"


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
        wait_until(lambda: metric(server, "hocket_requests_waiting") == 0)


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
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
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
        found, num_steps, _ = settle(server.url)
        assert not found
        assert num_steps <= 2
        assert sum(seen.values()) == 40
        assert len(seen) >= 3, f"they left in different phases: {seen}"
        assert call(server, "POST", "/v1/completions", LONG | {"max_tokens": 2})[0].status == 200
