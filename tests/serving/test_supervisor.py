"""Restarts: when, how often, what clients are told meanwhile, and that the dead are not heard."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.messages import Failed, Ready, StepEvents
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import InstanceId, RequestId, TokenEvent
from serving.cluster import supervisor
from serving.cluster.driver import ClusterDriver
from serving.cluster.supervisor import FIRST_DELAY_S, MAX_DELAY_S, WELL_AFTER_S, Supervisor
from serving.errors import Unavailable, UserError
from serving.metrics import Metrics
from serving.text.tokenizer import fake_codec
from tests.factories import make_geometry, make_scheduler, make_spec

VIEW = make_scheduler().view()


def steps(num_steps, *tokens):
    view = replace(VIEW, num_steps=num_steps)
    return StepEvents([], [], list(tokens), [], [], view, 0.1)


class Incarnation:
    """A handle that does what the test says."""

    instance_id = InstanceId("i0")

    def __init__(self, *, starts=True, hangs=False):
        self.commands = []
        self.is_stopped = False
        self._starts = starts
        self._hangs = hangs

    async def start(self, on_report):
        self.report = on_report
        if not self._starts:
            raise UserError("no memory", "wait")
        if self._hangs:
            await asyncio.Event().wait()
        return Ready("m", "float32", "cpu", 64, make_geometry())

    def send(self, command):
        self.commands.append(command)

    async def stop(self):
        self.is_stopped = True


class Supervised:
    """A supervisor whose clock the test holds; a start in `bad_starts` fails, or hangs."""

    def __init__(self, bad_starts=(), hanging_starts=()):
        self.now = 0.0
        self.delays = []
        self.handles = []
        self._bad_starts = bad_starts
        self._hanging_starts = hanging_starts
        self.metrics = Metrics("m")
        self.driver = ClusterDriver(
            ClusterScheduler(),
            fake_codec(),
            self.metrics,
            clock=lambda: self.now,
        )
        self._supervisor = Supervisor(
            self.driver, self._make, clock=lambda: self.now, sleep=self._sleep
        )

    def _make(self, incarnation):
        self.handles.append(
            Incarnation(
                starts=incarnation not in self._bad_starts,
                hangs=incarnation in self._hanging_starts,
            )
        )
        return self.handles[-1]

    async def _sleep(self, seconds):
        self.delays.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    async def __aenter__(self):
        await self._supervisor.start()
        return self

    async def __aexit__(self, *_):
        await self._supervisor.stop()
        await self.driver.stop()

    def fail(self):
        self.handles[-1].report(Failed("why"))

    async def until_up(self):
        async with asyncio.timeout(5):
            while not self.driver.alive:  # noqa: ASYNC110 (it comes up by itself)
                await asyncio.sleep(0)


def supervised(scenario, **settings):
    async def run():
        async with Supervised(**settings) as fleet:
            await scenario(fleet)

    asyncio.run(run())


def test_restarts_come_later_and_later():
    async def scenario(fleet):
        for _ in range(9):
            fleet.fail()
            assert not fleet.driver.alive
            await fleet.until_up()
        assert fleet.delays == [0.5, 1, 2, 4, 8, 16, MAX_DELAY_S, MAX_DELAY_S, MAX_DELAY_S]
        assert len(fleet.handles) == 10

    supervised(scenario)


def test_one_that_served_long_enough_is_forgiven():
    async def scenario(fleet):
        for served_s in (0, WELL_AFTER_S - 1, WELL_AFTER_S, 1):
            fleet.now += served_s
            fleet.fail()
            await fleet.until_up()
        assert fleet.delays == [FIRST_DELAY_S, 1, FIRST_DELAY_S, 1]

    supervised(scenario)


def test_a_restart_that_fails_is_tried_again():
    async def scenario(fleet):
        fleet.fail()
        await fleet.until_up()
        assert fleet.delays == [0.5, 1, 2]

    supervised(scenario, bad_starts=(2, 3))


def test_a_restart_that_hangs_is_given_up_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "MIN_RESTART_LIMIT_S", 0.05)

    async def scenario(fleet):
        fleet.fail()
        await fleet.until_up()
        assert fleet.delays == [0.5, 1]
        assert [handle.is_stopped for handle in fleet.handles] == [False, True, False]

    supervised(scenario, hanging_starts=(2,))
    (line,) = [line for line in caplog.messages if "does not start" in line]
    assert line.startswith("instance i0 does not start: it took longer than 0.05 s")


def test_a_first_start_that_fails_is_the_users():
    async def run():
        with pytest.raises(UserError, match="no memory"):
            async with Supervised(bad_starts=(1,)):
                pass

    asyncio.run(run())


def test_while_it_is_down_new_requests_are_told_to_come_again():
    async def scenario(fleet):
        fleet.driver.submit([make_spec("a")], [])
        fleet.fail()
        with pytest.raises(Unavailable) as refusal:
            fleet.driver.submit([make_spec("b")], [])
        assert refusal.value.code == "no_instance"
        assert refusal.value.headers()["retry-after"]
        await fleet.until_up()
        fleet.driver.submit([make_spec("c")], [])
        assert [command.spec.request_id for command in fleet.handles[-1].commands] == ["a", "c"]

    supervised(scenario)


def test_they_are_told_to_come_when_it_should_be_up():
    async def scenario(fleet):
        waits = []
        sleep = fleet._sleep

        async def asked(seconds):
            with pytest.raises(Unavailable) as refusal:
                fleet.driver.submit([make_spec("a")], [])
            waits.append(refusal.value.retry_after_s)
            await sleep(seconds)

        fleet._supervisor._sleep = asked
        for _ in range(4):
            fleet.fail()
            await fleet.until_up()
        delays = [1, 1, 2, 4]  # at least a second
        assert all(0.75 * s <= wait <= 1.25 * s for wait, s in zip(waits, delays, strict=True))
        assert fleet.driver.up_in_s == 1

    supervised(scenario)


def test_an_older_incarnation_is_not_heard():
    async def scenario(fleet):
        old = fleet.handles[0]
        old.report(steps(100))
        fleet.fail()
        await fleet.until_up()
        group = fleet.driver.submit([make_spec("a")], [])
        late = TokenEvent(RequestId("a"), 0, 5)
        old.report(steps(101, late))
        old.report(Failed("again"))
        assert fleet.driver.alive
        assert group.streams[0].num_tokens == 0
        fleet.handles[1].report(steps(3, late))
        assert group.streams[0].num_tokens == 1
        page = fleet.metrics.render().decode()
        (line,) = [line for line in page.splitlines() if line.startswith("hocket_steps_total")]
        assert float(line.split()[-1]) == 103, "steps are counted across incarnations"

    supervised(scenario)


def test_a_server_that_drains_starts_one_for_those_it_accepted_only():
    async def scenario(fleet):
        group = fleet.driver.submit([make_spec("a")], [])
        fleet.driver.begin_drain()
        fleet.fail()
        await fleet.until_up()
        assert [command.spec.request_id for command in fleet.handles[-1].commands] == ["a"]
        fleet.driver.cancel(group)
        fleet.fail()
        await asyncio.sleep(0.01)
        assert not fleet.driver.alive
        assert len(fleet.handles) == 2

    supervised(scenario)


def test_one_that_is_lost_as_it_comes_up_never_gets_work():
    class LostAtOnce(Incarnation):
        async def start(self, on_report):
            ready = await super().start(on_report)
            on_report(Failed("at once"))
            return ready

    async def run():
        driver = ClusterDriver(ClusterScheduler(), fake_codec(), Metrics("m"))
        handle = LostAtOnce()
        await driver.start(handle)
        assert not driver.ready
        assert await driver.until_lost(handle) == "at once"

    asyncio.run(run())
