"""A whole server whose parts are killed and frozen: what clients see, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from serving.progress import NoProgress
from serving.replay import report
from serving.store.local import resolve
from tests.serving.servers import (
    RunningServer,
    children_of,
    running_server,
    starting_server,
)
from tests.serving.test_http import LONG, call, connect, metric
from tests.serving.test_process import is_gone, until
from tests.tiny_gguf import write_tiny_gguf

NUM_CLIENTS = 4  # of each kind


def child_of(pid):
    """The process of the model: the server's only child."""
    (child,) = children_of(pid)
    return child


QUESTION = LONG | {"max_tokens": 100, "temperature": 0}


@contextmanager
def loaded(server):
    """Clients that stream and clients that wait; yields what each of them got in the end."""
    answers = []

    def ask(stream):
        answers.append((stream, text_of(server, stream=stream)))

    threads = [
        threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(2 * NUM_CLIENTS)
    ]
    num_before = metric(server, "hocket_time_to_first_token_seconds_count")
    for thread in threads:
        thread.start()
    begun = num_before + 2 * NUM_CLIENTS
    until(lambda: metric(server, "hocket_time_to_first_token_seconds_count") == begun)
    yield answers
    for thread in threads:
        thread.join(timeout=30)
    assert len(answers) == 2 * NUM_CLIENTS


def text_of(server, *, stream):
    """Return the answer to the question, of which nothing may be amiss."""
    response, payload = call(server, "POST", "/v1/completions", QUESTION | {"stream": stream})
    assert response.status == 200, payload
    if not stream:
        answer = json.loads(payload)
        assert answer["usage"]["completion_tokens"] == 100
        return answer["choices"][0]["text"]
    *events, done, rest = payload.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [event.removeprefix(b"data: ") for event in events if not event.startswith(b":")]
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


def instances_of(pid):
    """Its processes of models, from when they have become that: a fork is not yet one."""
    words = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children_of(pid)}
    return [child for child, line in words.items() if "serving.instance" in line]


def answers_at_all(server):
    with suppress(ConnectionRefusedError):
        return status(server, "/health")


def status(server, path):
    return call(server, "GET", path)[0].status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_instance_comes_back_and_its_requests_go_on(number):
    with running_server("--fake", "--watchdog-timeout", "0.5") as server:
        expected = text_of(server, stream=False)
        child = child_of(server.process.pid)
        with loaded(server) as answers:
            os.kill(child, number)
            until(lambda: status(server, "/health") == 503)
            assert status(server, "/ready") == 503
            response, payload = call(server, "POST", "/v1/completions", LONG)
            assert (response.status, json.loads(payload)["error"]["code"]) == (503, "no_instance")
            assert response.headers["retry-after"]
        assert [text for _, text in answers] == [expected] * len(answers)
        assert {stream for stream, _ in answers} == {False, True}
        assert metric(server, "hocket_request_replays_total") == 2 * NUM_CLIENTS
        assert is_gone(child)
        assert child_of(server.process.pid) != child
        assert status(server, "/ready") == status(server, "/health") == 200
        assert server.terminate() == 0


@pytest.mark.parametrize("ends", [False, True])
def test_a_server_that_loads_says_so_and_may_be_stopped(ends):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with starting_server("--fake", "--port", str(port)) as process:
        server = RunningServer(process, f"http://127.0.0.1:{port}", "fake", "")
        until(lambda: instances_of(process.pid))
        (child,) = instances_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        until(lambda: answers_at_all(server))
        for method, path in (("GET", "/health"), ("GET", "/ready"), ("POST", "/v1/completions")):
            response, payload = call(server, method, path, LONG if method == "POST" else None)
            assert (response.status, json.loads(payload)["error"]["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) >= 1
        if ends:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0, "nothing had been accepted"
            assert is_gone(child)
        else:
            os.kill(child, signal.SIGCONT)
            until(lambda: status(server, "/ready") == 200)


def test_the_instance_does_not_outlive_its_server():
    with running_server("--fake") as server:
        child = child_of(server.process.pid)
        os.kill(child, signal.SIGSTOP)  # not even a frozen one
        server.process.kill()
        until(lambda: is_gone(child))


def test_ctrl_c_reaches_the_whole_group_and_running_requests_end_all_the_same():
    with running_server("--fake", start_new_session=True) as server:
        child = child_of(server.process.pid)
        connection = connect(server)
        connection.request(
            "POST", "/v1/completions", json.dumps(LONG | {"max_tokens": 60}),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        until(lambda: metric(server, "hocket_requests_running") == 1)
        os.killpg(server.process.pid, signal.SIGINT)
        response = connection.getresponse()
        assert json.loads(response.read())["usage"]["completion_tokens"] == 60
        assert server.process.wait(timeout=30) == 0
        assert is_gone(child)
        connection.close()


def test_the_second_signal_ends_everything_at_once():
    with running_server("--fake") as server:
        child = child_of(server.process.pid)
        connection = connect(server)
        connection.request(
            "POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"}
        )
        until(lambda: metric(server, "hocket_requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: status(server, "/ready") == 503)
        assert status(server, "/health") == 200, "to drain is no illness"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 1
        assert is_gone(child)
        connection.close()


def test_each_incarnation_keeps_a_decision_log_of_its_own(tmp_path, capsys):
    log = tmp_path / "decisions.jsonl"
    with running_server("--fake", "--decision-log", str(log)) as server:
        call(server, "POST", "/v1/completions", LONG | {"max_tokens": 3})
        os.kill(child_of(server.process.pid), signal.SIGKILL)
        until(lambda: status(server, "/ready") == 503)
        until(lambda: status(server, "/ready") == 200)
        call(server, "POST", "/v1/completions", LONG | {"max_tokens": 3})
        server.terminate()
    for path in (log, Path(f"{log}.2")):
        assert report(path), "it replays"
    assert "0 decisions, 0 differences\n" not in capsys.readouterr().out.splitlines(keepends=True)


def test_only_the_process_of_the_model_loads_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "Tiny.gguf")
    model = resolve(str(tmp_path / "Tiny.gguf"), NoProgress()).path  # a conversion needs torch
    with running_server(str(model)) as server:
        pids = server.process.pid, child_of(server.process.pid)
        has_torch = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids]
        assert has_torch == [False, True]
