"""An instance in a process of its own: how it dies, what is told, that nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.messages import Failed, StepEvents, Submit
from scheduler.types import InstanceId
from serving.cluster.hosts import process
from serving.cluster.hosts.child import Child
from serving.cluster.hosts.child_host import ChildHost
from serving.cluster.hosts.process import ProcessHandle
from serving.errors import UserError
from tests.factories import make_spec
from tests.serving.checksum_instance import PROGRAM
from tests.serving.servers import children_of
from tests.serving.test_handles import Served

ENDLESS = make_spec("a", max_tokens=250)


def make_handle(name="m", program=PROGRAM, **settings):
    config = EngineConfig(model_name=name, model_folder=Path("x"), decision_log=Path("y"))
    return ProcessHandle(InstanceId("i0"), ChildHost(config, program=program), **settings)


def is_gone(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        # One that nobody waits for here, as it is not our child, stays as a zombie for a moment.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def failure_of(scenario, **settings):
    """Run the scenario on a handle until it fails; return the failure."""

    async def run():
        async with Served(make_handle(**settings)) as instance:
            await scenario(instance)
            await instance.until(
                lambda: instance.reports and isinstance(instance.reports[-1], Failed)
            )
            assert is_gone(instance.handle.pid), "it is gone before that is said"
            return instance.reports[-1]

    return asyncio.run(run())


def test_one_that_is_killed_is_named_with_the_signal():
    async def scenario(instance):
        instance.submit(ENDLESS)
        await instance.until(lambda: instance.events("tokens"))
        os.kill(instance.handle.pid, signal.SIGKILL)

    assert failure_of(scenario).cause == "killed by SIGKILL"


FORKS = """
import os, runpy, time
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
runpy.run_module("tests.serving.checksum_instance", run_name="__main__", alter_sys=True)
"""


def test_death_is_seen_though_a_grandchild_holds_the_connection():
    grandchildren = []

    async def scenario(instance):
        grandchildren.extend(children_of(instance.handle.pid))
        instance.submit(ENDLESS)
        await instance.until(lambda: instance.events("tokens"))
        os.kill(instance.handle.pid, signal.SIGKILL)

    try:
        assert failure_of(scenario, program=("-c", FORKS)).cause == "killed by SIGKILL"
        (grandchild,) = grandchildren
        assert not is_gone(grandchild)
    finally:
        for pid in grandchildren:
            os.kill(pid, signal.SIGKILL)


def test_the_connection_is_not_handed_down_to_what_it_starts():
    async def run():
        async with Served(make_handle()) as instance:
            process = Path(f"/proc/{instance.handle.pid}")
            sockets = [
                link.name
                for link in (process / "fd").iterdir()
                if str(link.readlink()).startswith("socket:")
            ]
            assert sockets
            for number in sockets:
                words = (process / "fdinfo" / number).read_text().split()
                assert int(words[words.index("flags:") + 1], 8) & os.O_CLOEXEC

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", ["it exited with status 3", "it last said: its last words"]),
        ("aborts", ["killed by SIGABRT"]),
    ],
)
def test_one_that_ends_by_itself_is_named_with_its_last_words(name, words, caplog):
    async def scenario(instance):
        instance.submit(make_spec(name))

    cause = failure_of(scenario).cause
    assert [word for word in words if word not in cause] == []
    if name == "aborts":
        assert "i0: Fatal Python error: Aborted" in caplog.messages


@pytest.mark.parametrize("freezes", [True, False], ids=["frozen", "hanging"])
def test_one_that_owes_a_step_for_too_long_is_taken_down(freezes, caplog):
    async def scenario(instance):
        await asyncio.sleep(0.8)
        assert not instance.reports, "who owes nothing may rest"
        instance.submit(make_spec("hangs" if not freezes else "a", max_tokens=250))
        if freezes:
            os.kill(instance.handle.pid, signal.SIGSTOP)

    failed = failure_of(scenario, watchdog_timeout_s=0.3)
    assert failed.cause == "no step for 0.3 s with 1 request"
    if not freezes:
        assert any("in go_wrong" in message for message in caplog.messages), "it says where it was"


def test_one_that_is_frozen_and_owes_nothing_is_taken_down():
    async def scenario(instance):
        os.kill(instance.handle.pid, signal.SIGSTOP)

    assert failure_of(scenario, watchdog_timeout_s=0.4).cause == "no sign of life for 0.4 s"


@pytest.mark.parametrize("name", ["raises", "exits"])
def test_a_crash_at_the_start_shows_the_last_words(name):
    async def run():
        handle = make_handle(name)
        with pytest.raises(UserError) as error:
            await handle.start(lambda _: None)
        assert is_gone(handle.pid)
        return error.value.cause

    words = {"raises": "RuntimeError: a fault of ours (", "exits": "its last words"}
    cause = asyncio.run(run())
    assert words[name] in cause
    assert "\n" not in cause


def test_a_start_that_says_nothing_has_a_limit_of_its_own():
    async def run():
        handle = make_handle("sleeps", startup_timeout_s=0.4, watchdog_timeout_s=0.1)
        with pytest.raises(UserError, match=r"said nothing for 0.4 s"):
            await handle.start(lambda _: None)
        assert is_gone(handle.pid)

    asyncio.run(run())


def test_a_machine_that_has_no_process_left_is_the_users(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    async def run():
        handle = make_handle()
        with pytest.raises(UserError, match="cannot be started: No such file"):
            await handle.start(lambda _: None)
        await handle.stop()

    asyncio.run(run())


def test_a_start_can_be_given_up():
    async def run():
        handle = make_handle("sleeps")
        starting = asyncio.ensure_future(handle.start(lambda _: None))
        await asyncio.sleep(0.1)
        await handle.stop()
        assert is_gone(handle.pid)
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(run())


def test_the_progress_of_the_start_is_told():
    class Noted:
        def __init__(self):
            self.told = []

        def phase(self, name, total):
            self.told.append((name, total))

        def advance(self, done):
            self.told.append(done)

    async def run(progress):
        async with Served(make_handle(progress=progress)) as instance:
            assert instance.ready.startup_s.keys() == {"weights"}

    progress = Noted()
    asyncio.run(run(progress))
    assert progress.told == [("reading weights", 2), 1]


GARBAGE = "import os; os.write(int(os.sys.argv[-1]), {!r}); import time; time.sleep(60)"


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\3\x92\xa1x"],
)
def test_garbage_ends_the_connection(data):
    async def run():
        handle = make_handle(program=("-c", GARBAGE.format(data)))
        with pytest.raises(UserError, match="it sent what is no message"):
            await handle.start(lambda _: None)
        assert is_gone(handle.pid)

    asyncio.run(run())


def test_one_that_does_not_read_is_taken_down(monkeypatch):
    monkeypatch.setattr(process, "_MAX_UNREAD_BYTES", 1 << 20)

    async def scenario(instance):
        os.kill(instance.handle.pid, signal.SIGSTOP)
        for number in range(40):
            instance.submit(make_spec(f"r{number}", range(100_000, 120_000)))

    assert "of commands unread" in failure_of(scenario).cause


def test_a_stuck_one_is_stopped_all_the_same():
    async def run():
        async with Served(make_handle()) as instance:
            instance.submit(make_spec("hangs"))
            await asyncio.sleep(0.05)
            start_s = time.monotonic()
            await instance.handle.stop()
            assert time.monotonic() - start_s < 10
            assert is_gone(instance.handle.pid)
            assert not instance.reports

    asyncio.run(run())


def test_signals_of_the_terminal_do_not_reach_it():
    async def run():
        async with Served(make_handle()) as instance:
            instance.submit(ENDLESS)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(instance.handle.pid, number)
            await instance.until_ended("a")

    asyncio.run(run())


def test_it_ends_with_its_connection_even_if_it_is_stuck():
    with Child(PROGRAM) as child:
        child.begin(EngineConfig(model_name="sleeps", model_folder=None))
        until(lambda: child.connection.recv(1 << 16))
        assert not child.has_ended()
        child.connection.close()
        until(child.has_ended)


def test_a_wrong_command_ends_it_with_the_reason():
    with Child(PROGRAM) as child:
        child.begin(EngineConfig(model_name="m", model_folder=None))
        child.connection.sendall(b"\0\0\0\1\xc1")
        until(child.has_ended)
        assert b"the connection to the driver failed" in child.output.read()


def test_a_report_that_is_at_odds_with_ours_ends_it():
    async def run():
        reports = []

        def take(report):
            reports.append(report)
            if isinstance(report, StepEvents):
                raise AssertionError("token 2, not 1")

        handle = make_handle()
        await handle.start(take)
        handle.send(Submit(ENDLESS))
        async with asyncio.timeout(20):
            while not isinstance((reports or [None])[-1], Failed):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert len(reports) == 2
        assert "AssertionError (" in reports[-1].cause
        assert "token 2, not 1" not in reports[-1].cause
        assert "token 2, not 1" in reports[-1].trace
        await handle.stop()

    asyncio.run(run())


def test_nothing_is_left_of_those_that_are_gone():
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    async def run():
        counts = []
        for number in range(4):
            async with Served(make_handle()) as instance:
                if number % 2:
                    os.kill(instance.handle.pid, signal.SIGKILL)
                    await instance.until(lambda: instance.reports)
            assert is_gone(instance.handle.pid)
            await asyncio.sleep(0.01)
            counts.append(open_files())
        assert counts == [counts[0]] * 4

    asyncio.run(run())
