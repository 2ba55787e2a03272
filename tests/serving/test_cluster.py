"""From the driver to an instance and back: streams, lost instances, messages on the wire."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from engine.core import EngineCore
from engine.messages import (
    Abort,
    Failed,
    Inspect,
    Inspected,
    Ping,
    Pong,
    Ready,
    StepEvents,
    Stop,
    Submit,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.config import ClusterConfig
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    InstanceId,
    Logprobs,
    PromptLogprobs,
    RejectedEvent,
    RejectReason,
    RequestId,
    StartedEvent,
    TokenEvent,
)
from serving.cluster.driver import ClusterDriver
from serving.cluster.hosts import wire
from serving.cluster.hosts.inproc import InProcessHandle
from serving.cluster.streams import RequestStream, StreamGroup
from serving.errors import GenerationFailed, InstanceLost, Unavailable
from serving.metrics import Metrics
from serving.text.tokenizer import fake_codec
from tests.factories import make_executor, make_geometry, make_scheduler, make_spec

CODEC = fake_codec()


def build(emit, executor=None, max_num_running=8):
    core = EngineCore(make_scheduler(), executor or make_executor(), emit)
    return core, Ready("m", "checksum", "none", 256, make_geometry(), {}, max_num_running)


class BreaksAtStep:
    """A checksum executor that fails at one step, as a device that is lost does."""

    def __init__(self, step_id):
        self._executor = make_executor()
        self._step_id = step_id

    def submit(self, plan):
        if plan.step_id == self._step_id:
            raise RuntimeError("device lost")
        self._executor.submit(plan)

    def poll(self):
        return self._executor.poll()

    def close(self):
        self._executor.close()


async def start_driver(executor=None, max_requests=8):
    config = ClusterConfig(max_num_waiting=0, continuation_timeout_s=0.1)
    driver = ClusterDriver(ClusterScheduler(config), CODEC, Metrics("m"))
    handle = InProcessHandle(
        InstanceId("i0"), lambda emit: build(emit, executor, max_requests), through_wire=True
    )
    assert not driver.ready
    await driver.start(handle)
    assert driver.ready
    return driver


async def read(group):
    async with asyncio.timeout(20):
        return [delta async for news in group.news() for delta in news.deltas]


def test_latencies_begin_when_the_request_arrived():
    """Not when the driver took it: reading, admitting and tokenising it came before."""

    async def scenario():
        driver = await start_driver()
        arrived_at_s = time.monotonic() - 100
        group = driver.submit([make_spec("a", max_tokens=2)], [], arrived_at_s=arrived_at_s)
        await read(group)
        (times,) = (stream.times for stream in group.streams)
        assert times.intake_s >= 100
        assert times.e2e_s >= times.ttft_s >= 100
        assert times.prefill_s < 100
        await driver.stop()

    asyncio.run(scenario())


def test_a_lost_instance_fails_its_requests_and_takes_no_more():
    async def scenario():
        driver = await start_driver(BreaksAtStep(3))
        group = driver.submit([make_spec("a", max_tokens=20)], [])
        with pytest.raises(InstanceLost):
            await read(group)
        assert not driver.ready
        assert not driver.alive
        with pytest.raises(Unavailable, match="no instance is up"):
            driver.submit([make_spec("b")], [])
        await driver.stop()

    asyncio.run(scenario())


def test_several_requests_are_taken_together_or_not_at_all():
    async def scenario():
        driver = await start_driver(max_requests=2)
        specs = [make_spec(name, max_tokens=4) for name in ("a", "b", "c", "d", "e")]
        with pytest.raises(Unavailable, match="full"):
            driver.submit(specs[:3], [])
        assert driver.ready
        async with asyncio.timeout(20):  # the two that were taken back leave their places
            while True:
                try:
                    group = driver.submit(specs[3:], [])
                    break
                except Unavailable:
                    await asyncio.sleep(0)
        deltas = await read(group)
        assert {index for index, _ in deltas} == {0, 1}
        assert await driver.drain(timeout_s=5)
        await driver.stop()

    asyncio.run(scenario())


def test_an_idle_driver_drains_at_once_and_refuses():
    async def scenario():
        driver = await start_driver()
        assert await driver.drain(timeout_s=5)
        with pytest.raises(Unavailable, match="shutting down"):
            driver.submit([make_spec("a")], [])
        await driver.stop()

    asyncio.run(scenario())


def break_at_second_token(stream):
    deliver = stream.deliver

    def broken(output_index, token_id, logprobs=None):
        if output_index == 1:
            raise ValueError("a secret of the user")
        return deliver(output_index, token_id, logprobs)

    stream.deliver = broken


def break_finish(stream):
    def broken(reason):
        raise ValueError("a secret of the user")

    stream.finish = broken


def break_scores(stream):
    def broken(start, positions):
        raise ValueError("a secret of the user")

    stream.take_prompt_logprobs = broken


@pytest.mark.parametrize("fault", [break_at_second_token, break_finish, break_scores])
def test_a_fault_of_ours_with_one_request_ends_that_one_alone(fault, caplog):
    async def scenario():
        driver = await start_driver()
        broken = driver.submit([make_spec("a", range(8), max_tokens=9, prompt_logprobs=1)], [])
        other = driver.submit([make_spec("b", max_tokens=30)], [])
        fault(broken.streams[0])
        with pytest.raises(GenerationFailed, match="could not be computed"):
            await read(broken)
        deltas = await read(other)
        assert sum(len(delta.token_ids) for _, delta in deltas) == 30
        assert driver.alive
        async with asyncio.timeout(20):  # its place is free again
            while (await driver.inspect(5))["cluster"]["assigned"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
        group = driver.submit([make_spec("c")], [])
        fault(group.streams[0])
        driver.cancel(group)  # what its client's end brings about does not raise
        await driver.stop()

    asyncio.run(scenario())
    assert "no answer could be made of tokens" in caplog.messages


def test_a_request_that_fails_while_the_server_drains_did_not_end_well():
    async def scenario():
        driver = await start_driver(BreaksAtStep(3))
        group = driver.submit([make_spec("a", max_tokens=20)], [])
        assert not await driver.drain(timeout_s=5)
        with pytest.raises(InstanceLost):
            await read(group)
        await driver.stop()

    asyncio.run(scenario())


def make_stream(stops=(), **spec):
    return RequestStream(make_spec("a", **spec), CODEC, stops, StreamGroup())


def test_tokens_beyond_a_stop_string_count_for_nothing():
    stream = make_stream(stops=["BC"])
    ids = CODEC.encode("ABCDE", add_special_tokens=False)
    matched = [stream.deliver(index, token) for index, token in enumerate(ids[:3])]
    assert matched == [False, False, True]
    stream.finish(FinishReason.STOP)
    assert not stream.deliver(3, ids[3])
    delta = stream.take()
    assert (delta.text, delta.finish_reason, stream.num_tokens) == ("A", FinishReason.STOP, 3)
    assert stream.take() is None


def test_a_stop_string_before_min_tokens_is_text():
    stream = make_stream(stops=["A"], min_tokens=2)
    ids = CODEC.encode("AABAC", add_special_tokens=False)
    matched = [stream.deliver(index, token) for index, token in enumerate(ids[:4])]
    assert matched == [False, False, False, True]
    assert stream.take().text == "AAB"


def test_a_lost_token_is_a_broken_invariant():
    stream = make_stream()
    stream.deliver(0, 5)
    with pytest.raises(AssertionError, match="token 2, not 1"):
        stream.deliver(2, 5)


def test_the_end_token_has_no_text():
    stream = make_stream(stop_token_ids=(34,))
    stream.deliver(0, 33)
    stream.deliver(1, 34)
    stream.finish(FinishReason.STOP)
    delta = stream.take()
    assert (delta.text, delta.token_ids) == ("A", (33, 34))


def test_scores_wait_with_their_text():
    stream = make_stream(stops=["CD"], logprobs=0)
    ids = CODEC.encode("ABCEé", add_special_tokens=False)
    taken = []
    for index, token in enumerate(ids):
        stream.deliver(index, token, Logprobs(-1.0 - index))
        delta = stream.take()
        taken.append((delta.text, [scored.text_offset for scored in delta.scored]))
    assert taken == [("A", [0]), ("B", [1]), ("", []), ("CE", [2, 3]), ("", []), ("é", [4, 4])]


def test_the_scores_of_a_prompt_come_in_pieces_and_may_repeat():
    stream = make_stream(prompt=range(6))
    scores = [Logprobs(-float(i)) for i in range(1, 6)]
    for start, end in ((1, 3), (1, 2), (2, 5), (5, 6)):
        stream.take_prompt_logprobs(start, scores[start - 1 : end - 1])
    assert stream.prompt_logprobs == scores
    with pytest.raises(AssertionError, match="prompt logprobs from 9, not 6"):
        stream.take_prompt_logprobs(9, scores)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgspec.msgpack.encode(["Submit", 3]), msgspec.msgpack.encode(["No"])]
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(msgspec.DecodeError):
        wire.decode_command(data)


@pytest.mark.parametrize(
    "command",
    [
        Submit(make_spec("a", seed=2**63 - 1, logit_bias=((3, -1.5),), bad_token_ids=((1, 2),))),
        Abort(RequestId("a")),
        Abort(RequestId("a"), 7),
        Inspect(3),
        Ping(),
        Stop(),
    ],
)
def test_commands_survive_the_wire(command):
    assert wire.decode_command(wire.encode(command)) == command


@pytest.mark.parametrize(
    "report",
    [
        Failed("why"),
        Pong(),
        Ready("m", "float32", "cpu", 256, make_geometry()),
        Inspected(3, {"waiting": [], "running": {"a": 1}}),
        StepEvents(
            started=[StartedEvent(RequestId("a"), 0.5, 16)],
            prompt_logprobs=[PromptLogprobs(RequestId("a"), 1, (Logprobs(-0.5, ((3, -0.1),)),))],
            tokens=[
                TokenEvent(RequestId("a"), 0, 5, Logprobs(-0.1)),
                TokenEvent(RequestId("b"), 1, 2),
            ],
            finished=[FinishedEvent(RequestId("b"), FinishReason.ERROR, 1, "why")],
            rejected=[RejectedEvent(RequestId("c"), RejectReason.QUEUE_FULL)],
            view=make_scheduler().view(),
            step_s=0.1,
        ),
    ],
)
def test_reports_survive_the_wire(report):
    assert wire.decode_report(wire.encode(report)) == report
