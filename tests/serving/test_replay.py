"""Requests whose instance dies go on elsewhere: what a client gets is what it would have got."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.core import EngineCore
from engine.messages import Abort, Failed, Ready, StepEvents, Submit
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.config import ClusterConfig
from scheduler.types import FinishedEvent, FinishReason, InstanceId, RequestId
from serving.cluster.driver import ClusterDriver
from serving.cluster.hosts.inproc import InProcessHandle
from serving.errors import InstanceLost, Quarantined
from serving.metrics import Metrics
from serving.text.tokenizer import fake_codec
from tests.factories import make_executor, make_geometry, make_scheduler, make_spec
from tests.serving.scripted import VIEW

CODEC = fake_codec()
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
PROMPT = tuple(CODEC.encode("Once upon a time there was", add_special_tokens=False))
MAX_TOKENS = 24


class Breaks:
    """A checksum executor that is lost at one of its steps, or when it computes what it dies of."""

    def __init__(self, step_id=None, poison=()):
        self._executor = make_executor()
        self._step_id = step_id
        self._poison = poison
        self._is_lost = False

    def submit(self, plan):
        self._is_lost |= plan.step_id == self._step_id
        self._is_lost |= any(join.request_id in self._poison for join in plan.joins)
        if self._is_lost:
            raise RuntimeError("device lost")
        self._executor.submit(plan)

    def poll(self):
        return self._executor.poll()

    def close(self):
        self._executor.close()


def handle(instance_id, step_id=None, poison=()):
    def build(emit):
        core = EngineCore(make_scheduler(), Breaks(step_id, poison), emit)
        return core, Ready("m", "checksum", "none", 256, make_geometry(), {}, 8)

    return InProcessHandle(instance_id, build, through_wire=True)


class Paused:
    """An instance that takes commands, and does nothing before it may."""

    def __init__(self, instance_id):
        self.instance_id = instance_id
        self.num_aborts = 0
        self._open = []
        self._report = None

    async def start(self, on_report):
        self._report = on_report
        return Ready("m", "checksum", "none", 256, make_geometry(), {}, 8)

    def send(self, command):
        match command:
            case Submit(spec):
                self._open.append(spec.request_id)
            case Abort():
                self.num_aborts += 1

    def go_on(self):
        """End what was aborted."""
        ended = [FinishedEvent(key, FinishReason.ABORT, 0, "") for key in self._open]
        self._report(StepEvents([], [], [], ended, [], VIEW, 0.0))

    def fail(self):
        self._report(Failed("gone", ""))

    async def stop(self):
        pass


def make_driver(**settings):
    metrics = Metrics("m")
    return ClusterDriver(ClusterScheduler(ClusterConfig(**settings)), CODEC, metrics), metrics


async def answers(group):
    """Return what a client that streams gets of each choice: text, ids, reason, logprobs."""
    texts = ["" for _ in group.streams]
    ids, scored = ([[] for _ in group.streams] for _ in range(2))
    reasons = [None for _ in group.streams]
    async with asyncio.timeout(20):
        async for news in group.news():
            for index, delta in news.deltas:
                texts[index] += delta.text
                ids[index] += delta.token_ids
                scored[index] += delta.scored
                reasons[index] = delta.finish_reason
    of_prompts = [stream.prompt_logprobs for stream in group.streams]
    return list(zip(texts, ids, reasons, scored, of_prompts, strict=True))


def choices(**params):
    spec = make_spec("r", PROMPT, max_tokens=MAX_TOKENS, **params)
    params = spec.params
    return [
        replace(spec, request_id=RequestId(f"r{choice}"), params=replace(params, choice=choice))
        for choice in range(2)
    ]


KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "penalties": {
        "temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "min_tokens": 5, "logit_bias": ((7, 1.5),),
    },
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
}  # fmt: skip


async def undisturbed(specs, stops):
    driver, _ = make_driver()
    await driver.start(handle(A))
    try:
        return await answers(driver.submit(specs, stops))
    finally:
        await driver.stop()


@pytest.mark.parametrize("kind", [*KINDS, "stop string"])
def test_an_instance_may_die_at_any_step(kind):
    """Two choices each; on the second instance their prompt and what they had is computed anew."""
    specs = choices(**KINDS.get(kind, {}))

    async def run():
        stops = []
        expected = await undisturbed(specs, stops)
        if kind == "stop string":  # of the first choice, half of it in one life and half in another
            stops = [expected[0][0][9:14]]
            expected = await undisturbed(specs, stops)
            assert len(expected[0][0]) < MAX_TOKENS
        num_replayed = 0
        for step_id in range(MAX_TOKENS + 4):
            driver, metrics = make_driver()
            await driver.start(handle(A, step_id))
            group = driver.submit(specs, stops)
            reading = asyncio.ensure_future(answers(group))
            await asyncio.wait(
                [reading, asyncio.ensure_future(driver.until_lost(driver._instances[A].handle))],
                return_when=asyncio.FIRST_COMPLETED,
            )
            await driver.start(handle(B))
            assert await reading == expected, f"lost at step {step_id}"
            page = metrics.render().decode()
            assert f'hocket_prompt_tokens_total{{model="m"}} {2.0 * len(PROMPT)}' in page
            num_tokens = sum(len(ids) for _, ids, *_ in expected)
            assert f'hocket_generation_tokens_total{{model="m"}} {float(num_tokens)}' in page
            num_replayed += metrics._store.total("request_replays")
            await driver.stop()
        assert num_replayed > MAX_TOKENS

    asyncio.run(run())


def test_a_dying_instance_hands_its_requests_to_one_that_lives():
    specs = [make_spec(f"r{i}", (i + 1, 2, 3), max_tokens=60) for i in range(6)]

    async def run():
        expected = await undisturbed(specs, [])
        driver, metrics = make_driver(dispatch="round_robin")
        await driver.start(handle(A, 20))
        await driver.start(handle(B))
        assert await answers(driver.submit(specs, [])) == expected
        assert metrics._store.total("request_replays") == 3
        assert driver.num_queued == driver.num_streams == 0
        await driver.stop()

    asyncio.run(run())


def test_when_no_other_comes_in_time_the_client_is_told():
    async def run():
        driver, _ = make_driver(continuation_timeout_s=0.1)
        await driver.start(handle(A, 5))
        with pytest.raises(InstanceLost, match="no other was up in time"):
            await answers(driver.submit([make_spec("r", max_tokens=60)], []))
        assert driver.num_queued == driver.num_streams == 0
        await driver.stop()

    asyncio.run(run())


def test_whoever_leaves_meanwhile_is_not_run_again():
    async def run():
        driver, _ = make_driver()
        lost = handle(A, 5)
        await driver.start(lost)
        group = driver.submit([make_spec("r", max_tokens=60)], [])
        await driver.until_lost(lost)
        assert driver.num_queued == 1
        driver.cancel(group)
        assert driver.num_queued == driver.num_streams == 0
        await driver.stop()

    asyncio.run(run())


def test_what_instances_die_of_ends_and_comes_back_no_more():
    """Its neighbours, who were there at both deaths, get all that they would have got."""
    others = [make_spec(f"r{i}", (i + 1, 2, 3), max_tokens=30) for i in range(4)]
    poison = make_spec("poison", (9, 9, 9), max_tokens=30)

    async def run():
        expected = await undisturbed(others, [])
        driver, _ = make_driver()
        num_deaths = 0
        current = handle(A, poison=["poison"])
        await driver.start(current)
        reading = asyncio.ensure_future(answers(driver.submit(others, [])))
        dying = asyncio.ensure_future(driver.submit([poison], []).whole())
        while not dying.done():
            lost = asyncio.ensure_future(driver.until_lost(current))
            await asyncio.wait([dying, lost], return_when=asyncio.FIRST_COMPLETED, timeout=10)
            lost.cancel()
            if not driver.alive:
                num_deaths += 1
                current = handle(A, poison=["poison"])
                await driver.start(current)
        with pytest.raises(Quarantined):
            await dying
        assert num_deaths <= 4
        assert await reading == expected
        with pytest.raises(Quarantined):  # a client that tries again
            driver.submit([replace(poison, request_id=RequestId("again"))], [])
        await driver.stop()

    asyncio.run(run())


def test_an_instance_that_is_drained_runs_empty_and_gets_nothing():
    async def run():
        driver, metrics = make_driver()
        await driver.start(handle(A))
        group = driver.submit([make_spec("r", max_tokens=60)], [])
        draining = asyncio.ensure_future(driver.drain_instance(A, 20))
        await driver.start(handle(B))
        driver.submit([make_spec("s", max_tokens=60)], [])
        assert [each.state for each in driver.instances()] == ["draining", "up"]
        await answers(group)
        drained = await draining
        assert drained.num_moved == 0
        assert metrics._store.number("dispatches", A).value == 1
        assert 'hocket_instance_up{instance="a"' in metrics.render().decode()
        await driver.remove_instance(A)
        assert [each.instance_id for each in driver.instances()] == [B]
        page = metrics.render().decode()
        assert 'hocket_instance_up{instance="a"' not in page, "nobody is to be alarmed"
        assert 'hocket_dispatches_total{instance="a"' in page
        await driver.stop()

    asyncio.run(run())


@pytest.mark.parametrize("timeout_s", [0.0, 0.01])
def test_what_a_drain_does_not_await_goes_on_elsewhere(timeout_s):
    specs = [make_spec(f"r{i}", (i + 1, 2, 3), max_tokens=200) for i in range(3)]

    async def run():
        expected = await undisturbed(specs, [])
        driver, metrics = make_driver()
        await driver.start(handle(A))
        reading = asyncio.ensure_future(answers(driver.submit(specs, [])))
        await driver.start(handle(B))
        drained = await driver.drain_instance(A, timeout_s)
        assert drained.num_moved == 3
        await driver.remove_instance(A)
        assert await reading == expected
        assert metrics._store.total("request_replays") == 3
        await driver.stop()

    asyncio.run(run())


def test_a_drain_waits_for_an_instance_that_takes_requests():
    specs = [make_spec(f"r{i}", (i + 1, 2, 3), max_tokens=200) for i in range(3)]

    async def run():
        expected = await undisturbed(specs, [])
        driver, _ = make_driver()
        await driver.start(paused := Paused(A))
        reading = asyncio.ensure_future(answers(driver.submit(specs, [])))
        draining = asyncio.ensure_future(driver.drain_instance(A, 0))
        done, _ = await asyncio.wait([draining], timeout=0.05)
        assert not done, "nobody else takes them"
        assert paused.num_aborts == 0
        await driver.start(handle(B))
        assert await reading == expected
        assert paused.num_aborts == 3, "each is told once"
        paused.go_on()
        assert (await draining).num_moved == 3
        await driver.stop()

    asyncio.run(run())


@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
def test_a_drain_ends_with_its_instance(timeout_s):
    async def run():
        driver, _ = make_driver()
        await driver.start(handle(A, step_id=4))
        group = driver.submit([make_spec("r", max_tokens=60)], [])
        drained = await asyncio.wait_for(driver.drain_instance(A, timeout_s), 10)
        assert drained.num_moved == 0
        assert [each.state for each in driver.instances()] == ["down"]
        driver.cancel(group)
        await driver.stop()

    asyncio.run(run())


def test_what_follows_a_loss_of_one_that_was_drained_is_drained():
    async def run():
        driver, metrics = make_driver()
        await driver.start(first := Paused(A))
        await driver.start(handle(B))
        await driver.drain_instance(A, 20)
        first.fail()
        assert [each.state for each in driver.instances()] == ["down", "up"]
        await driver.start(handle(A))
        assert [each.state for each in driver.instances()] == ["draining", "up"]
        await answers(driver.submit([make_spec(f"r{i}") for i in range(4)], []))
        assert metrics._store.number("dispatches", A).value == 0
        assert (await driver.drain_instance(A, 20)).num_moved == 0
        await driver.remove_instance(A)  # by plan: the next one is another
        await driver.start(handle(A))
        assert [each.state for each in driver.instances()] == ["up", "up"]
        await driver.stop()

    asyncio.run(run())


def test_whoever_was_only_queued_when_the_last_instance_died_is_told_to_come_again():
    async def run():
        driver, _ = make_driver(continuation_timeout_s=0.1)
        await driver.start(handle(A, 5))
        group = driver.submit([make_spec(f"r{i}", max_tokens=60) for i in range(12)], [])
        assert driver.num_queued == 2, "eight run, two are spare"
        queued = group.streams[-1]
        with pytest.raises(InstanceLost):
            await answers(group)
        assert (queued.error.status, queued.error.code) == (503, "no_instance")
        assert driver.num_queued == driver.num_streams == 0
        await driver.stop()

    asyncio.run(run())
