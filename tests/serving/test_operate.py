"""`hocket status`, `scale`, `restart`, `drain`: with a real server, and with a scripted one."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading

import pytest

from serving.errors import UserError
from serving.operate.client import AdminClient
from serving.operate.table import table
from serving.operate.verbs import Operator
from tests.serving.servers import running_server
from tests.serving.test_start import hocket

KEY = "an-operators-key-0123456789"


@pytest.fixture(scope="module")
def server():
    """It asks operators for a key."""
    keys = {"HOCKET_ADMIN_KEYS": f"ops: {KEY}"}
    with running_server("--fake", "--admin-port", "0", env=keys) as running:
        yield running


@pytest.fixture
def for_programs(server):
    lines = []
    return Operator(AdminClient(server.admin_url, KEY), lines.append, as_json=True), lines


@pytest.fixture
def operator(server):
    lines = []
    return Operator(AdminClient(server.admin_url, KEY), lines.append), lines


def test_the_ready_block_says_what_to_type_next(server):
    assert f"Operate      hocket status --admin {server.admin_url}" in re.sub(
        "Operate +", "Operate      ", server.block
    )


def test_the_command_shows_the_instances(server):
    os.environ["HOCKET_ADMIN_KEY"] = KEY
    try:
        done = hocket("status", "--admin", server.admin_url)
        as_json = hocket("status", "--json", "--admin", server.admin_url)
    finally:
        del os.environ["HOCKET_ADMIN_KEY"]
    assert done.returncode == 0, done.stderr
    head, _, columns, row = done.stdout.splitlines()
    assert head == "fake: 1 of 1 instance up, 0 requests, 0 queued at the router"
    assert columns.split()[0] == "INSTANCE"
    assert row.split()[:2] == ["instance-0", "up"]
    status = json.loads(as_json.stdout)
    (instance,) = status["instances"]
    assert f"pid {instance['pid']}" in row
    assert (status["num_wanted"], status["session"]) == (1, None)


def test_scaling_to_what_there_is_is_done_at_once(operator):
    it, lines = operator
    it.scale(1)
    assert lines == ["scaling to 1: done"]


def test_programs_get_the_change_when_it_is_done(for_programs):
    it, lines = for_programs
    it.scale(1)
    (line,) = lines
    change = json.loads(line)
    assert (change["title"], change["done"], change["error"]) == ("scaling to 1", True, None)


@pytest.mark.parametrize(
    ("ask", "cause", "remedy"),
    [
        (lambda it: it.scale(2), "without Ray", "--instances 2"),
        (lambda it: it.scale(0), "greater than or equal to 1", ""),
        (lambda it: it.restart(), "nothing would serve", "scale to 2 first"),
        (lambda it: it.drain("instance-0"), "no other instance", "scale up first"),
        (lambda it: it.drain("instance-9"), "there are: instance-0", "hocket status"),
        (lambda it: it.drain(""), "instance: String should have at least 1", ""),
    ],
)
def test_what_cannot_be_done_is_one_cause_and_one_remedy(operator, ask, cause, remedy):
    it, lines = operator
    with pytest.raises(UserError) as error:
        ask(it)
    assert cause in error.value.cause
    assert remedy in error.value.remedy
    assert lines == []


def test_without_the_key_nobody_is_let_in(server):
    for key in (None, "some-other-key-0123456789"):
        with pytest.raises(UserError) as error:
            AdminClient(server.admin_url, key).get("/admin/status")
        assert "HOCKET_ADMIN_KEY" in error.value.remedy
    with pytest.raises(UserError, match="cannot be sent"):
        AdminClient(server.admin_url, "a\nb").get("/admin/status")


def test_another_port_is_no_admin_port(server):
    with pytest.raises(UserError, match="is no admin port") as error:
        AdminClient(server.url).get("/admin/status")
    assert "--admin" in error.value.remedy


def test_no_server_is_one_cause_and_one_remedy():
    done = hocket("status", "--admin", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "hocket: no server is at http://127.0.0.1:1",
        "        start one with --admin-port 8001, or name its admin port with --admin",
    ]
    for url in (
        "ftp://x",
        "http://",
        "http://127.0.0.1:",
        "127.0.0.1:",
        "http://127.0.0.1:/",
        "http://a:0",
        "http://a:99999",
    ):
        with pytest.raises(UserError, match="is no address"):
            AdminClient(url)


def test_a_drain_of_the_server(operator, for_programs):
    it, lines = operator
    for_programs[0].drain()
    assert json.loads(for_programs[1][0]) == {"status": "drained", "num_requests": 0}
    it.drain()
    assert lines == ["the server is drained: end it with SIGTERM"]
    it.status()
    assert "draining: new requests are refused" in lines[-1]


# --- what a server may say, from a script ---


class Answers(http.server.BaseHTTPRequestHandler):
    """Gives the answers of the server, one after the other; the last for ever."""

    def do_GET(self):
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"] or 0))
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted():
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()
        thread.join()


def change(*lines, done=False, error=None, number=1):
    return {
        "number": number,
        "kind": "restart",
        "title": "rolling restart",
        "done": done,
        "lines": list(lines),
        "error": error,
    }


def under_way(now, last=None):
    return {"change": now, "last_change": last}


def run(scripted, *answers, lines=None, **settings):
    scripted.answers = list(answers)
    lines = [] if lines is None else lines
    client = AdminClient(scripted.url)
    Operator(client, lines.append, sleep=lambda _: None, **settings).restart()
    return lines


def test_each_line_is_shown_once(scripted):
    assert run(
        scripted,
        (202, {"change": change("a")}),
        (200, under_way(change("a", "b"))),
        (200, under_way(change("a", "b"))),
        (200, under_way(None, change("a", "b", "c", done=True))),
    ) == ["a", "b", "c", "rolling restart: done"]


def test_a_change_that_failed_is_an_error(scripted):
    failed = change("a", done=True, error={"cause": "no memory", "remedy": "buy some"})
    with pytest.raises(UserError, match="no memory") as error:
        run(scripted, (202, {"change": change()}), (200, under_way(None, failed)))
    assert error.value.remedy == "buy some"


def test_a_later_change_ends_the_watching(scripted):
    later = under_way(change(number=2))
    lines = run(scripted, (202, {"change": change("a")}), (200, later))
    assert lines == ["a", "rolling restart is over, and another change has begun since"]


def test_who_does_not_wait_is_told_where_to_look(scripted):
    (line,) = run(scripted, (202, {"change": change("a")}), waits=False)
    assert "hocket status" in line


def test_programs_that_do_not_wait_get_the_change_as_it_is(scripted):
    begun = change("a")
    (line,) = run(scripted, (202, {"change": begun}), waits=False, as_json=True)
    assert json.loads(line) == begun


def test_programs_get_a_change_that_failed_too(scripted):
    failed = change("a", done=True, error={"cause": "no memory", "remedy": "buy some"})
    lines = []
    with pytest.raises(UserError, match="no memory"):
        run(scripted, (202, {"change": failed}), lines=lines, as_json=True)
    assert [json.loads(line) for line in lines] == [failed]


def test_ctrl_c_ends_the_watching_alone(scripted):
    scripted.answers = [(202, {"change": change("a")})]
    lines = []

    def interrupted(_):
        raise KeyboardInterrupt

    operator = Operator(AdminClient(scripted.url), lines.append, sleep=interrupted)
    with pytest.raises(KeyboardInterrupt):
        operator.restart()
    assert lines == ["a", "it goes on; `hocket status` shows how far it is"]


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (200, b"<html>", "is no Hocket server"),
        (200, b"[]", "is no Hocket server"),
        (500, {}, "status 500"),
        (503, {"error": {"message": "the model is still loading"}}, "still loading"),
    ],
)
def test_an_answer_that_is_of_no_use(scripted, status, body, cause):
    scripted.answers = [(status, body)]
    with pytest.raises(UserError, match=cause) as error:
        AdminClient(scripted.url).get("/admin/status")
    assert error.value.remedy


def test_a_table_of_several():
    def instance(name, **fields):
        shown = {
            "instance": name,
            "state": "up",
            "incarnation": 1,
            "num_restarts": 0,
            "pid": 7,
            "node": None,
            "dtype": "float32",
            "device": "cpu",
            "num_running": 0,
            "num_waiting": 0,
            "kv_usage": 0.0,
        }
        return shown | fields

    status = {
        "model": "m",
        "is_draining": False,
        "num_requests": 1,
        "num_queued": 2,
        "num_wanted": 3,
        "session": {"version": "2.60", "address": "10.0.0.1:6379", "logs": "/tmp/logs"},
        "instances": [
            instance("instance-0", num_running=12, kv_usage=0.5, node="10.0.0.2"),
            instance("instance-1", state="starting", dtype=None, pid=None, num_restarts=10),
        ],
        "change": None,
        "last_change": None,
    }
    assert table(status) == (
        "m: 1 of 3 instances up, 1 request, 2 queued at the router\n"
        "\n"
        "INSTANCE    STATE     RUNNING  WAITING   KV  RESTARTS  INCARNATION  MODEL           "
        "WHERE\n"
        "instance-0  up             12        0  50%         0            1  float32 on cpu  "
        "pid 7 on 10.0.0.2\n"
        "instance-1  starting        0        0   0%        10            1  -               -\n"
        "\n"
        "Ray 2.60 at 10.0.0.1:6379, logs in /tmp/logs"
    )
    begun = status | {"change": change("instance-2 starts"), "session": None}
    assert table(begun).splitlines()[-1] == "rolling restart: instance-2 starts"
    failed = change(done=True, error={"cause": "no memory", "remedy": ""})
    shown = table(status | {"last_change": failed, "session": None})
    assert shown.splitlines()[-1] == "rolling restart failed: no memory"
