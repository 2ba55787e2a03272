"""Instances as Ray actors: how they die, what survives Ray, that nothing is left, who is let in."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.messages import Failed
from serving.cluster.hosts.process_session import members_of
from serving.cluster.placement import Placement
from serving.cluster.ray.address import asks_for_a_token
from serving.errors import UserError
from tests.factories import make_spec
from tests.properties.law import solo
from tests.serving.ray_sessions import Started
from tests.serving.test_handles import Served
from tests.serving.test_process import is_gone, until

ENDLESS = make_spec("a", max_tokens=250)
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


@pytest.fixture
def own_session():
    """A session that may be broken."""
    with asyncio.Runner() as runner:
        started = Started(runner)
        yield started
        started.stop()
        shutil.rmtree(started.folder)  # the logs of a session that went badly are kept


@pytest.fixture
def joined(ray_session, monkeypatch):
    """The cluster that is a session of another, joined."""
    with_token_of(ray_session, monkeypatch)
    started = Started(ray_session.runner, address=ray_session.facts.address)
    yield started
    started.stop()


def with_token_of(started, monkeypatch):
    (token,) = started.folder.glob("*.token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))


def failure_of(started, scenario, **settings):
    """Run the scenario on a handle until it fails; return the failure and how long that took."""

    async def run():
        async with Served(started.handle(**settings)) as instance:
            instance.submit(ENDLESS)
            await instance.until(lambda: instance.events("tokens"))
            start_s = time.monotonic()
            await scenario(instance)
            await instance.until(lambda: isinstance(instance.reports[-1], Failed))
            assert is_gone(instance.handle.pid), "it is gone before that is said"
            return instance.reports[-1].cause, time.monotonic() - start_s

    return started.run(run())


# --- deaths ---


def test_one_that_is_killed_is_missed_by_its_connection(ray_session):
    async def scenario(instance):
        os.kill(instance.handle.pid, signal.SIGKILL)

    cause, _ = failure_of(ray_session, scenario)
    assert cause == "its process ended"


def test_one_that_is_frozen_is_killed_by_its_pid(ray_session):
    async def scenario(instance):
        os.kill(instance.handle.pid, signal.SIGSTOP)

    cause, _ = failure_of(ray_session, scenario, watchdog_timeout_s=0.3)
    assert cause == "no step for 0.3 s with 1 request"


def test_what_it_prints_last_is_told_and_logged(ray_session, caplog):
    async def scenario(instance):
        instance.submit(make_spec("exits"))

    cause, _ = failure_of(ray_session, scenario)
    assert cause == "its process ended; it last said: its last words"
    assert "i0: its last words" in caplog.messages


def test_signals_of_the_terminal_do_not_reach_it(ray_session):
    async def run():
        async with Served(ray_session.handle()) as instance:
            instance.submit(ENDLESS)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(instance.handle.pid, number)
            await instance.until_ended("a")

    ray_session.run(run())


def test_it_stands_back_behind_nobody(ray_session):
    """Ray's own default is a niceness of 15: the router alone would then slow its steps down."""

    async def run():
        async with Served(ray_session.handle()) as instance:
            ours = os.getpriority(os.PRIO_PROCESS, 0)
            assert os.getpriority(os.PRIO_PROCESS, instance.handle.pid) == ours

    ray_session.run(run())


# --- what Ray is told ---


def test_requests_and_tokens_say_nothing_to_ray(ray_session, monkeypatch):
    """Counted: what crosses between this process and Ray's while an instance serves."""
    control, told, heard = ray_session.session._control, [], []

    def counting(pass_on, counted):
        def count(message):
            counted.append(type(message).__name__)
            pass_on(message)

        return count

    monkeypatch.setattr(control, "_send", counting(control._send, told))
    monkeypatch.setattr(control, "_on_report", counting(control._on_report, heard))

    async def run():
        async with Served(ray_session.handle()) as instance:
            for number in range(20):
                instance.submit(make_spec(f"r{number}", max_tokens=30))
                await instance.until_ended(f"r{number}")
            assert len(instance.events("tokens")) == 20 * 30

    ray_session.run(run())
    assert told == ["Place", "Remove"]
    assert len(heard) < 5, "Placed, Ended, and perhaps the end of one before"


# --- without Ray ---


def test_what_runs_goes_on_without_ray_and_what_starts_gets_a_new_session(own_session):
    async def run():
        async with Served(own_session.handle()) as instance:
            instance.submit(ENDLESS)
            first = own_session.control_pid
            # The head's processes end with it, and it with one of them: see the benches.
            (head,) = own_session.pids_of("gcs/gcs_server ")
            os.kill(head, signal.SIGKILL)
            await instance.until(lambda: own_session.session._control.is_gone)
            assert list(members_of(first)) == [instance.handle.pid]
            await instance.until_ended("a")
            assert instance.tokens("a") == solo(ENDLESS)[0]
            async with Served(own_session.handle()) as another:
                assert own_session.control_pid != first
                another.submit(ENDLESS)
                await another.until_ended("a")
                os.kill(own_session.control_pid, signal.SIGKILL)
                os.kill(instance.handle.pid, signal.SIGKILL)
                await instance.until(lambda: isinstance(instance.reports[-1], Failed))
                await instance.until(lambda: own_session.session._control.is_gone)
                another.submit(make_spec("b"))
                await another.until_ended("b")

    own_session.run(run())


SERVES = """
import asyncio, sys
from tests.serving.ray_sessions import Started
from tests.serving.test_handles import Served
async def serve(started):
    async with Served(started.handle()) as instance:
        print(started.control_pid, instance.handle.pid, started.folder, flush=True)
        await asyncio.sleep(60)
with asyncio.Runner() as runner:
    started = Started(runner)
    started.run(serve(started))
"""


def test_nothing_but_logs_is_left_of_a_server_that_was_killed(tmp_path):
    shared_memory = set(Path("/dev/shm").iterdir())
    server = subprocess.Popen(
        [sys.executable, "-c", SERVES], stdout=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    control_pid, instance_pid, folder = server.stdout.readline().split()
    server.kill()
    server.wait()
    server.stdout.close()
    until(lambda: is_gone(int(instance_pid)))
    until(lambda: not list(members_of(int(control_pid))))
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    files = [path for path in Path(folder).rglob("*") if not path.is_dir()]
    assert files
    assert [path for path in files if "logs" not in path.parts and path.suffix != ".log"] == []
    shutil.rmtree(folder)


def environment(folder):
    """Return what another process needs to import this code, with its temporary files there."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}


# --- placement ---


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Placement(num_gpus=4000), "no node has 4000 GPU at all: there is "),
        (Placement(labels=(("gpu_type", "A100"),)), "no node has gpu_type=A100 at all"),
        (Placement(num_cpus=1000, num_devices=2), "no node has 2 times 1000 CPU at all"),
        (Placement(memory_bytes=1 << 60), "no node has 1073741824.0 GiB of memory at all"),
        (Placement(resources=(("disk", 1.0),)), "no node has 1 disk at all"),
    ],
)
def test_what_no_node_can_hold_is_said_at_once(ray_session, placement, words):
    async def run():
        handle = ray_session.handle(placement=placement)
        async with asyncio.timeout(10):
            with pytest.raises(UserError) as error:
                await handle.start(lambda _: None)
        await handle.stop()
        assert words in error.value.cause
        assert "add a node" in error.value.remedy

    ray_session.run(run())


NUM_CPUS = len(os.sched_getaffinity(0))
WHOLE_NODE = Placement(num_cpus=NUM_CPUS / 2, num_devices=2)


def test_what_several_devices_need_is_reserved_while_it_runs(ray_session):
    async def run():
        for _ in range(2):  # the first one's room is given back
            async with Served(ray_session.handle(placement=WHOLE_NODE)) as instance:
                instance.submit(ENDLESS)
                await instance.until_ended("a")
                control = ray_session.session._control
                waiting = control.place(f"{ray_session.session._prefix}waits", WHOLE_NODE, b"")
                async with asyncio.timeout(10):
                    await waiting.registered  # though there is no room
                    control.remove(f"{ray_session.session._prefix}waits")
                    await waiting.ended

    ray_session.run(run())


def test_several_devices_that_ask_for_nothing_are_placed(ray_session):
    async def run():
        async with Served(ray_session.handle(placement=Placement(num_devices=2))):
            pass

    ray_session.run(run())


# --- strangers ---


def test_all_of_a_session_listens_on_loopback_alone(ray_session):
    async def run():
        async with Served(ray_session.handle()):
            return {pid: listeners_of(pid) for pid in ray_session.pids()}

    listeners = ray_session.run(run())
    assert len(listeners) >= 6
    addresses = [address for each in listeners.values() for address in each]
    assert addresses
    assert {address for address in addresses if address not in LOOPBACK} == set()


def listeners_of(pid):
    """Return the addresses at which a process listens, in the kernel's notation."""
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return [
        fields[1].partition(":")[0]
        for fields in lines
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links
    ]


JOINS = """
import sys
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False
import ray
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
except ray.exceptions.AuthenticationError:
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("token", "status"), [(None, 3), ("0" * 64, 3), ("its own", 0)], ids=["none", "wrong", "right"]
)
def test_a_driver_without_the_token_is_refused(ray_session, token, status, monkeypatch):
    with_token_of(ray_session, monkeypatch)
    if token != "its own":
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
        monkeypatch.setenv("RAY_AUTH_MODE", "token" if token else "disabled")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token or "")
    monkeypatch.setenv("RAY_py_gcs_connect_timeout_s", "1")
    done = subprocess.run(
        [sys.executable, "-c", JOINS, ray_session.facts.address], capture_output=True, timeout=60
    )
    assert done.returncode == status


def test_the_token_is_seen_by_nobody_else(ray_session):
    (file,) = ray_session.folder.glob("*.token")
    token = file.read_text()
    assert len(token) == 64
    assert file.stat().st_mode & 0o777 == 0o600
    assert ray_session.folder.stat().st_mode & 0o777 == 0o700
    for pid, command in ray_session.pids().items():
        assert token not in command
        assert token.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


# --- a cluster of others ---


def test_a_joined_cluster_serves_by_tls(joined):
    async def run():
        async with Served(joined.handle()) as instance:
            instance.submit(ENDLESS)
            await instance.until_ended("a")
            assert instance.tokens("a") == solo(ENDLESS)[0]

            assert instance.handle.node == "127.0.0.1"

    assert not joined.facts.is_local
    joined.run(run())


@pytest.mark.parametrize("stops", [False, True], ids=["killed", "frozen"])
def test_what_dies_elsewhere_is_missed_all_the_same(joined, stops):
    async def scenario(instance):
        os.kill(instance.handle.pid, signal.SIGSTOP if stops else signal.SIGKILL)

    cause, _ = failure_of(joined, scenario, watchdog_timeout_s=0.3)
    assert cause == ("no step for 0.3 s with 1 request" if stops else "its process ended")


def test_last_words_come_through_the_relay(joined):
    async def scenario(instance):
        instance.submit(make_spec("exits"))

    cause, _ = failure_of(joined, scenario)
    assert cause == "its process ended; it last said: its last words"


def test_a_cluster_is_left_as_it_was(ray_session, monkeypatch):
    with_token_of(ray_session, monkeypatch)

    async def run(started):
        handle = started.handle()
        await handle.start(lambda _: None)
        return handle.pid

    started = Started(ray_session.runner, address=ray_session.facts.address)
    pid = started.run(run(started))
    started.stop()  # without a word to the instance
    until(lambda: is_gone(pid))
    until(lambda: not ray_session.pids_of("tls_relay"))


def test_what_is_reserved_is_given_back_whoever_reserved_it(ray_session, monkeypatch):
    with_token_of(ray_session, monkeypatch)

    async def lose_both(started):
        async with Served(started.handle(placement=WHOLE_NODE)) as instance:
            os.kill(started.control_pid, signal.SIGKILL)
            await instance.until(lambda: started.session._control.is_gone)
            os.kill(instance.handle.pid, signal.SIGKILL)
            await instance.until(
                lambda: any(isinstance(report, Failed) for report in instance.reports)
            )

    async def serve():
        async with Served(ray_session.handle(placement=WHOLE_NODE)):
            pass

    started = Started(ray_session.runner, address=ray_session.facts.address)
    started.run(lose_both(started))
    started.run(lose_both(started))  # in the room that the first one had
    started.stop()
    ray_session.run(serve())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:1", "is no address of a Ray cluster"),
        ("somewhere", "is no address of a Ray cluster"),
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
    ],
)
def test_an_address_that_is_none_is_the_users_mistake(ray_session, address, words):
    with pytest.raises(UserError, match=words):
        Started(ray_session.runner, address=address)


def test_a_cluster_that_refuses_us_is_named(ray_session, monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("RAY_py_gcs_connect_timeout_s", "1")
    with pytest.raises(UserError, match="refuses us: its token is another") as error:
        Started(ray_session.runner, address=ray_session.facts.address)
    assert "RAY_AUTH_TOKEN_PATH" in error.value.remedy
    assert "instances that are up" not in caplog.text, "there are none"


def test_that_a_cluster_asks_for_a_token_is_tried_without_a_word(ray_session, capfd):
    assert asks_for_a_token(ray_session.facts.address)
    assert capfd.readouterr() == ("", "")
