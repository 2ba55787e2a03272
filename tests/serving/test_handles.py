"""The contract of an instance's handle, kept by all: in process, by wire, by process, by Ray."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from engine.config import EngineConfig
from engine.messages import Abort, Failed, Inspect, Inspected, Ping, StepEvents, Stop, Submit
from engine.startup import StartupTimes
from scheduler.types import FinishReason, InstanceId, RejectReason, RequestId
from serving.cluster.hosts.child_host import ChildHost
from serving.cluster.hosts.inproc import InProcessHandle
from serving.cluster.hosts.process import ProcessHandle
from serving.errors import UserError
from serving.progress import NoProgress
from tests.factories import make_geometry, make_spec
from tests.properties.law import solo
from tests.serving.checksum_instance import MAX_MODEL_LEN, PROGRAM, build


def in_process(name="m", through_wire=False):
    config = EngineConfig(model_name=name, model_folder=None)
    factory = partial(build, config, StartupTimes(NoProgress()))
    return InProcessHandle(InstanceId("i0"), factory, through_wire=through_wire)


def by_process(name="m"):
    config = EngineConfig(model_name=name, model_folder=None)
    return ProcessHandle(InstanceId("i0"), ChildHost(config, program=PROGRAM))


class Maker:
    """Makes handles, and runs what they are used in: a Ray session has an event loop already."""

    def __init__(self, make, run=asyncio.run):
        self.run = run
        self._make = make

    def __call__(self, name="m"):
        return self._make(name)


@pytest.fixture(params=["by reference", "through the wire", "by process", "by Ray"])
def make_handle(request):
    match request.param:
        case "by reference":
            return Maker(in_process)
        case "through the wire":
            return Maker(partial(in_process, through_wire=True))
        case "by process":
            return Maker(by_process)
        case _:
            ray_session = request.getfixturevalue("ray_session")
            return Maker(ray_session.handle, ray_session.run)


class Served:
    """A handle that was started, and all it reported."""

    def __init__(self, handle):
        self.handle = handle
        self.reports = []

    async def __aenter__(self):
        async with asyncio.timeout(20):
            self.ready = await self.handle.start(self.reports.append)
        return self

    async def __aexit__(self, *_):
        async with asyncio.timeout(20):
            await self.handle.stop()

    def submit(self, *specs):
        for spec in specs:
            self.handle.send(Submit(spec))

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 (the reports come by themselves)
                await asyncio.sleep(0.001)

    async def until_ended(self, *names):
        await self.until(lambda: set(names) <= set(self.ended))

    def events(self, kind):
        return [
            event
            for report in self.reports
            if isinstance(report, StepEvents)
            for event in getattr(report, kind)
        ]

    @property
    def ended(self):
        return {event.request_id: event.reason for event in self.events("finished")}

    def tokens(self, name):
        return [event.token_id for event in self.events("tokens") if event.request_id == name]


def served(make_handle, scenario, name="m"):
    async def run():
        async with Served(make_handle(name)) as instance:
            await scenario(instance)

    make_handle.run(run())


def test_it_serves_the_tokens_of_running_alone_and_reports_in_order(make_handle):
    specs = [make_spec(name, (1, 2, 3), max_tokens=20, seed=i) for i, name in enumerate("abc")]

    async def scenario(instance):
        assert instance.ready.geometry == make_geometry()
        instance.submit(*specs)
        await instance.until_ended("a", "b", "c")
        for spec in specs:
            assert instance.tokens(spec.request_id) == solo(spec)[0]
        indices = [e.output_index for e in instance.events("tokens") if e.request_id == "b"]
        assert indices == list(range(20))
        steps = [report.view.num_steps for report in instance.reports]
        assert steps == sorted(steps)

    served(make_handle, scenario)


def test_an_aborted_request_ends_once(make_handle):
    async def scenario(instance):
        instance.submit(make_spec("a", max_tokens=200))
        instance.handle.send(Abort(RequestId("a")))
        instance.handle.send(Abort(RequestId("a")))
        instance.handle.send(Abort(RequestId("nobody")))
        await instance.until_ended("a")
        instance.submit(make_spec("b", max_tokens=2))
        await instance.until_ended("b")
        (ended,) = [e for e in instance.events("finished") if e.request_id == "a"]
        assert ended.reason is FinishReason.ABORT

    served(make_handle, scenario)


def test_a_question_is_answered_under_its_number(make_handle):
    async def scenario(instance):
        instance.handle.send(Inspect(7))
        await instance.until(lambda: instance.reports)
        (answer,) = instance.reports
        assert isinstance(answer, Inspected)
        assert answer.number == 7

    served(make_handle, scenario)


def test_a_ping_is_answered_idle_or_at_work(make_handle):
    """By reports, or inside of the handle; and what runs goes on."""
    spec = make_spec("a", max_tokens=100)

    async def scenario(instance):
        for _ in range(3):
            instance.handle.send(Ping())
        instance.submit(spec)
        instance.handle.send(Ping())
        await instance.until(lambda: instance.events("tokens"))
        instance.handle.send(Ping())
        await instance.until_ended("a")
        assert instance.tokens("a") == solo(spec)[0]
        assert not [report for report in instance.reports if isinstance(report, Failed)]

    served(make_handle, scenario)


def test_a_request_that_fails_ends_alone(make_handle):
    neighbour = make_spec("b", (4, 5), max_tokens=6)

    async def scenario(instance):
        instance.submit(make_spec("poison"), neighbour)
        await instance.until_ended("poison", "b")
        assert instance.ended["poison"] is FinishReason.ERROR
        assert instance.tokens("b") == solo(neighbour)[0]

    served(make_handle, scenario)


def test_what_cannot_be_served_is_rejected(make_handle):
    async def scenario(instance):
        first = make_spec("a", max_tokens=100)
        instance.submit(first, first, make_spec("b", range(MAX_MODEL_LEN), max_tokens=1))
        await instance.until_ended("a")
        rejected = {(e.request_id, e.reason) for e in instance.events("rejected")}
        assert rejected == {("a", RejectReason.DUPLICATE_ID), ("b", RejectReason.NEVER_FITS)}
        assert instance.tokens("a") == solo(first)[0]

    served(make_handle, scenario)


def test_after_the_stop_nothing_follows(make_handle):
    async def scenario(instance):
        instance.submit(make_spec("a", max_tokens=200))
        await instance.until(lambda: instance.reports)
        await instance.handle.stop()
        num_reports = len(instance.reports)
        await instance.handle.stop()
        instance.submit(make_spec("b"))
        for command in (Abort(RequestId("a")), Inspect(1), Stop()):
            instance.handle.send(command)
        await asyncio.sleep(0.05)
        assert len(instance.reports) == num_reports
        assert not [report for report in instance.reports if isinstance(report, Failed)]

    served(make_handle, scenario)


def test_the_failure_comes_last_and_tells_the_cause(make_handle):
    async def scenario(instance):
        instance.submit(make_spec("a", max_tokens=200))
        await instance.until(lambda: instance.events("tokens"))
        instance.submit(make_spec("breaks"))
        await instance.until(lambda: isinstance(instance.reports[-1], Failed))
        instance.submit(make_spec("b"))
        instance.handle.send(Inspect(1))
        await asyncio.sleep(0.05)
        assert sum(isinstance(report, Failed) for report in instance.reports) == 1
        failed = instance.reports[-1]
        assert failed.cause.startswith("InvariantError (")
        assert "checksum_instance.py:" in failed.cause, "where it was"
        assert "lost" not in failed.cause, "a message may quote a request"
        assert "go_wrong" in failed.trace
        assert "is lost" in failed.trace

    served(make_handle, scenario)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-memory", ("not enough memory", "buy some")),
        ("no-format", ("no model", "another")),
        ("raises", ("RuntimeError: a fault of ours", "--kv-memory")),
    ],
)
def test_what_cannot_start_says_why_and_what_to_do(make_handle, name, words):
    async def run():
        handle = make_handle(name)
        with pytest.raises(UserError) as error:
            await handle.start(lambda _: None)
        await handle.stop()
        assert words[0] in error.value.cause
        assert words[1] in error.value.remedy

    make_handle.run(run())


def test_a_stop_while_it_starts_ends_the_start(make_handle):
    async def run():
        handle, reports = make_handle("slow"), []
        starting = asyncio.ensure_future(handle.start(reports.append))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            await handle.stop()
            with pytest.raises(asyncio.CancelledError):
                await starting
            await handle.stop()
        handle.send(Submit(make_spec("a")))
        await asyncio.sleep(0.05)
        assert not reports

    make_handle.run(run())


def test_what_never_started_can_be_stopped(make_handle):
    async def run():
        handle = make_handle()
        handle.send(Inspect(1))
        await handle.stop()
        await handle.stop()

    make_handle.run(run())
