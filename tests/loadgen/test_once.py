"""One run, in this process: what no request could be sent with, and what is kept of its address."""

from __future__ import annotations

import asyncio
import math
import resource
import socket

import pytest

from loadgen.mock import MockConfig, MockServer, serve
from loadgen.once import Asked, TargetFlags, run_once, why_nothing_came
from loadgen.servers import free_port, running
from loadgen.types import LoadError, Session, Turn
from tests.loadgen.results import failure, run_of
from tests.loadgen.test_client import with_server


def asked(url="http://127.0.0.1:9", *, num_turns=1, **flags):
    turns = tuple(Turn(prompt="a", max_tokens=1) for _ in range(num_turns))
    plan = (Session(start_at_s=0.0, turns=turns),) * 3
    flags = TargetFlags(model="mock", **flags)
    return Asked(name="run", url=url, plan=plan, seed=0, flags=flags)


@pytest.mark.parametrize(
    ("it", "cause"),
    [
        (asked(timeout=0.0), "a timeout of 0 s"),
        (asked(timeout=-5.0), "a timeout of -5 s"),
        (asked(timeout=math.nan), "a timeout of nan s"),
        (asked(timeout=math.inf), "a timeout of inf s"),
        (asked(api_key="abc\n"), "a character that no header may"),
        (asked("http://me:secret@host", api_key="abc"), "only one of them can be sent"),
        (asked("http://me:secret@host:99999"), "'http://host:99999' is no address"),
        (asked("http://"), "'http://' is no address"),
        (asked("ftp://host"), "'ftp://host' is no address"),
    ],
)
def test_what_no_request_can_be_sent_with_is_named(it, cause):
    with pytest.raises(LoadError) as caught:
        asyncio.run(run_once(it, asyncio.Event()))
    assert cause in caught.value.cause
    assert "secret" not in caught.value.cause + caught.value.remedy
    assert caught.value.remedy


def test_a_user_in_the_address_is_sent_and_not_kept():
    limits, users = resource.getrlimit(resource.RLIMIT_NOFILE), []
    server = MockServer(MockConfig(ttft_ms=1, error_rate=1.0))

    async def note(request, handler):
        users.append(request.headers.get("authorization", ""))
        users.append(resource.getrlimit(resource.RLIMIT_NOFILE))
        return await handler(request)

    note.__middleware_version__ = 1
    server.app.middlewares.append(note)

    def talk(url):
        return run_once(asked(url.replace("//", "//me:secret@"), num_turns=10), asyncio.Event())

    run = with_server(server.app, talk)
    assert users[0].startswith("Basic ")
    assert users[1] == (limits[1], limits[1]), "as many connections as the machine allows"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert "secret" not in run.url
    assert run.url.startswith("http://127.0.0.1:")
    assert (len(run.records), run.num_unsent) == (3, 27), "turns, not sessions"


@pytest.mark.parametrize("error", ["connect_timeout", "no_descriptors", "unsendable", "bad_answer"])
def test_every_class_has_its_own_remedy(error):
    problem = why_nothing_came(run_of(failure(0.0, 0.0, [], 1.0, error=error, detail="so")))
    assert problem is not None
    assert problem.remedy != "see the server's log"


@pytest.mark.parametrize(
    ("config", "port", "cause"),
    [
        (MockConfig(), 99999, "99999 is no port"),
        (MockConfig(), -1, "-1 is no port"),
        (MockConfig(ttft_ms=math.nan), 8000, "--ttft-ms of nan"),
        (MockConfig(itl_ms=-5), 8000, "--itl-ms of -5"),
        (MockConfig(freeze_s=math.inf), 8000, "--freeze-s of inf"),
        (MockConfig(error_rate=2), 8000, "--error-rate of 2"),
        (MockConfig(disconnect_rate=-0.1), 8000, "--disconnect-rate of -0.1"),
        (MockConfig(error_status=9), 8000, "--error-status of 9"),
        (MockConfig(default_tokens=0), 8000, "--default-tokens of 0"),
    ],
)
def test_a_mock_server_that_cannot_be_is_named(config, port, cause):
    with pytest.raises(LoadError) as caught:
        serve(config, port)
    assert cause in caught.value.cause
    assert caught.value.remedy


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LoadError, match=f"port {port}: Address already in use"):
            serve(MockConfig(), port)
    assert not capsys.readouterr().out, "nothing is said of a server that is none"
    assert free_port()


def test_what_a_server_said_before_it_died_cannot_steer_the_terminal():
    async def main():
        async with running("printf '\\033[2J\\342\\200\\256no {port}'", asyncio.Event()):
            pass

    with pytest.raises(LoadError, match="did not get ready") as caught:
        asyncio.run(main())
    assert "[2J no" in caught.value.cause.splitlines()[1]
    assert caught.value.cause.splitlines()[1].isprintable()
