"""One request's failure is its own: the culprit is found, all others get their tokens."""

from __future__ import annotations

import math
import random

import pytest

from engine.core import EngineCore
from engine.isolation import RowResults, run_isolated
from engine.messages import StepEvents, Submit
from scheduler.instance.plan import Failure, SampledToken
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.request import InvariantError
from scheduler.types import FinishReason, RequestId, TokenEvent
from tests.factories import VOCAB_SIZE, make_config, make_executor, make_geometry, make_spec
from tests.properties.law import FAULTS, solo

NUM_REQUESTS, NUM_POISON = 2000, 200


class Rows:
    """Stands for a batch: only which rows it has matters."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, kept):
        return Rows([self.rows[index] for index in kept])


class Device:
    """Computes rows, unless one of them is a culprit."""

    def __init__(self, culprits, error=RuntimeError):
        self.culprits = set(culprits)
        self.error = error
        self.runs = []

    def __call__(self, batch):
        self.runs.append(batch.rows)
        if self.culprits.intersection(batch.rows):
            raise self.error("bad row")
        return RowResults([SampledToken(RequestId(f"r{row}"), row) for row in batch.rows])


def isolate(num_rows, device, canary=lambda: None):
    request_ids = [RequestId(f"r{row}") for row in range(num_rows)]
    return run_isolated(Rows(list(range(num_rows))), device, request_ids, canary)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 64, 100])
def test_a_culprit_is_found_in_at_most_1_plus_log2_n_extra_runs(num_rows):
    for culprit in range(num_rows):
        device = Device([culprit])
        results = isolate(num_rows, device)
        assert [failure.request_id for failure in results.failures] == [f"r{culprit}"]
        failure = results.failures[0]
        assert failure.cause.startswith("RuntimeError (")
        assert "bad row" not in failure.cause, "a message may quote a request"
        assert "bad row" in failure.detail
        assert {token for _, token, _ in results.sampled} == set(range(num_rows)) - {culprit}
        assert len(results.sampled) == num_rows - 1, "a row was computed twice"
        assert len(device.runs) - 1 <= 1 + math.ceil(math.log2(num_rows))


def test_several_culprits_are_all_found():
    rng = random.Random(4)
    for _ in range(200):
        num_rows = rng.randint(1, 40)
        culprits = rng.sample(range(num_rows), rng.randint(0, min(6, num_rows)))
        results = isolate(num_rows, Device(culprits))
        assert {failure.request_id for failure in results.failures} == {f"r{c}" for c in culprits}
        assert sorted(token for _, token, _ in results.sampled) == sorted(
            set(range(num_rows)) - set(culprits)
        )


def test_an_error_that_does_not_come_again_is_nobodys():
    class Once(Device):
        def __call__(self, batch):
            if not self.runs:
                self.runs.append(batch.rows)
                raise RuntimeError("a hiccup")
            return super().__call__(batch)

    results = isolate(8, Once([]))
    assert results.failures == []
    assert sorted(token for _, token, _ in results.sampled) == list(range(8))


@pytest.mark.parametrize("error", [MemoryError, InvariantError])
def test_what_no_request_can_cause_ends_the_instance(error):
    device = Device([3], error)
    with pytest.raises(error):
        isolate(8, device)
    assert len(device.runs) == 1


def test_when_nobody_can_be_computed_the_canary_decides():
    asked = []
    assert len(isolate(2, Device([0, 1]), lambda: asked.append(1)).failures) == 2
    assert asked == [1]
    isolate(2, Device([0]), lambda: asked.append(2))
    assert asked == [1], "one was computed, so the model works"

    def dead():
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        isolate(2, Device([0, 1]), dead)


def test_when_all_rows_are_nan_the_canary_decides_too():
    asked = []

    def all_nan(batch):
        return RowResults(failures=[Failure(RequestId(f"r{row}"), "nan") for row in batch.rows])

    request_ids = [RequestId("r0"), RequestId("r1")]
    run_isolated(Rows([0, 1]), all_nan, request_ids, lambda: asked.append(1))
    assert asked == [1]


def test_a_failed_request_computes_no_more_but_its_id_may_come_again():
    computed, culprits = [], {"a"}

    def fault(request_id, positions):
        computed.append((request_id, positions))
        return "nan" if request_id in culprits else None

    scheduler = InstanceScheduler(make_config(), make_geometry())
    executor = make_executor(fault=fault)
    scheduler.add(make_spec("a"), 0.0)
    for _ in range(2):  # the second is planned before the failure is known
        executor.submit(scheduler.plan_step(0.0))
    assert computed == [("a", range(3))]
    (end,) = scheduler.complete_step(executor.poll())
    assert (end.request_id, end.reason) == ("a", FinishReason.ERROR)
    assert scheduler.complete_step(executor.poll()) == []

    culprits.clear()
    scheduler.add(make_spec("a"), 0.0)
    tokens = []
    while plan := scheduler.plan_step(0.0):
        executor.submit(plan)
        events = scheduler.complete_step(executor.poll())
        tokens += [event.token_id for event in events if isinstance(event, TokenEvent)]
    assert tokens == solo(make_spec("a"))[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_200_poisonous_requests_of_2000_end_alone(depth):
    rng = random.Random(depth)
    specs = [
        make_spec(
            f"r{index}",
            prompt=[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 20),
        )
        for index in range(NUM_REQUESTS)
    ]
    poison = {
        spec.request_id: (
            rng.choice(FAULTS),
            rng.randrange(len(spec.prompt_token_ids) + spec.params.max_tokens - 1),
        )
        for spec in rng.sample(specs, NUM_POISON)
    }

    def fault(request_id, positions):
        kind, position = poison.get(request_id, (None, -1))
        # A "sample" fault strikes at the next token that the request samples.
        return (
            kind
            if position in positions or (kind == "sample" and position < positions[0])
            else None
        )

    num_blocks = 200
    config = make_config(max_num_running=48, max_num_batched_tokens=128, max_num_waiting=2000)
    scheduler = InstanceScheduler(config, make_geometry(num_blocks))
    executor = make_executor(num_blocks, max_num_rows=48, fault=fault)
    reports: list[StepEvents] = []
    core = EngineCore(scheduler, executor, reports.append, depth=depth)
    for spec in specs:
        core.inbox.put(Submit(spec))
    core.turn()
    while scheduler.has_work or core._in_flight:
        core.turn()
    scheduler.check_idle()
    tokens: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
    ends = {}
    for report in reports:
        for event in report.tokens:
            tokens[event.request_id].append(event.token_id)
        for end in report.finished:
            ends[end.request_id] = end
    for spec in specs:
        expected, reason = solo(spec)
        if spec.request_id in poison:
            assert ends[spec.request_id].reason is FinishReason.ERROR
            assert ends[spec.request_id].error
            assert tokens[spec.request_id] == expected[: len(tokens[spec.request_id])]
        else:
            assert ends[spec.request_id].reason is reason
            assert tokens[spec.request_id] == expected
    num_steps = reports[-1].view.num_steps
    assert reports[-1].view.num_failures == NUM_POISON
    extra = executor.num_runs - num_steps
    assert 0 < extra <= NUM_POISON * (1 + math.ceil(math.log2(48)))
    assert reports[-1].view.kv.num_cleared_blocks > 0
