"""A request that goes on elsewhere, cut off at any token: what follows is as if it ran alone."""

from __future__ import annotations

import random
from dataclasses import replace
from io import BytesIO

import pytest

from engine.core import EngineCore
from engine.decision_log import RecordingScheduler, replay
from engine.messages import Submit
from scheduler.types import FinishReason, RejectedEvent, RejectReason, RequestId
from tests.factories import (
    VOCAB_SIZE,
    make_config,
    make_executor,
    make_geometry,
    make_scheduler,
    make_spec,
)
from tests.properties.oracle import tokens_alone

PROMPT = tuple(range(1, 12))
EVERY_TOKEN = tuple(range(VOCAB_SIZE))
PARAMS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "second choice": {"temperature": 1.0, "seed": 7, "choice": 1},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.5},
    "bias": {"logit_bias": ((5, 3.0), (6, -3.0))},
    "bad words": {"bad_token_ids": ((3, 4),), "allowed_token_ids": tuple(range(90))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 2))},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
}


class Engine:
    """A fresh instance, and what it said."""

    def __init__(self, *, depth=1, num_blocks=64, **settings):
        self.log = BytesIO()
        geometry = make_geometry(num_blocks)
        self.scheduler = RecordingScheduler(make_config(**settings), geometry, self.log)
        self.reports = []
        executor = make_executor(num_blocks)
        self.core = EngineCore(self.scheduler, executor, self.reports.append, depth=depth)

    def submit(self, spec, output_token_ids=()):
        self.core.inbox.put(Submit(spec, tuple(output_token_ids)))

    def serve(self):
        while self.scheduler.has_work or not self.core.inbox.empty():
            self.core.turn()
        while self.core._in_flight:  # surplus tokens only
            self.core.turn()
        self.scheduler.check_idle()
        return self

    def events(self, kind):
        return [event for report in self.reports for event in getattr(report, kind)]

    def tokens(self, name="r0"):
        """Return the index of the first token, and the tokens, which must follow one another."""
        events = [event for event in self.events("tokens") if event.request_id == name]
        indices = [event.output_index for event in events]
        assert indices == list(range(indices[0], indices[0] + len(events)))
        return indices[0], [event.token_id for event in events]

    def reason(self, name="r0"):
        (event,) = (event for event in self.events("finished") if event.request_id == name)
        return event.reason


def check(engine, spec, num_given):
    expected, reason = tokens_alone(spec)
    assert engine.tokens(spec.request_id) == (num_given, expected[num_given:])
    assert engine.reason(spec.request_id) is reason


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_cut_off_anywhere_it_goes_on_as_if_nothing_had_been(params, depth):
    spec = make_spec(prompt=PROMPT, max_tokens=14, **params)
    expected, _ = tokens_alone(spec)
    assert len(expected) > 2
    for cut in range(len(expected)):
        engine = Engine(depth=depth)
        engine.submit(spec, expected[:cut])
        check(engine.serve(), spec, cut)


def test_it_is_cut_off_again_and_again():
    spec = make_spec(prompt=PROMPT, max_tokens=30, temperature=1.0, seed=5, frequency_penalty=0.5)
    expected, _ = tokens_alone(spec)
    has = []
    while len(has) < len(expected):
        engine = Engine(depth=2)
        engine.submit(spec, has)
        engine.serve()
        first, tokens = engine.tokens()
        assert first == len(has)
        has += tokens[:4]  # of which its client heard so much when the instance died
    assert has == expected


def test_it_starts_once_before_its_first_token_and_is_scored_as_ever():
    spec = make_spec(prompt=PROMPT, max_tokens=14, logprobs=2, prompt_logprobs=1)
    whole = Engine()
    whole.submit(spec)
    whole.serve()
    for cut, budget in ((0, 9), (0, 32), (1, 9), (1, 32), (5, 9), (5, 32), (13, 32)):
        engine = Engine(max_num_batched_tokens=budget)
        engine.submit(spec, tokens_alone(spec)[0][:cut])
        engine.serve()
        (started,) = engine.events("started")
        assert started.request_id == spec.request_id
        with_start = next(report for report in engine.reports if report.started)
        with_token = next(report for report in engine.reports if report.tokens)
        assert engine.reports.index(with_start) <= engine.reports.index(with_token)
        scored = [event.logprobs for event in engine.events("tokens")]
        assert scored == [event.logprobs for event in whole.events("tokens")][cut:]
        scores = [one for event in engine.events("prompt_logprobs") for one in event.positions]
        assert scores == [
            one for event in whole.events("prompt_logprobs") for one in event.positions
        ]


@pytest.mark.parametrize("budget", [1, 2, 5, 16])
def test_its_known_tokens_are_computed_in_chunks_of_any_size(budget):
    spec = make_spec(prompt=PROMPT, max_tokens=20, temperature=1.0, seed=1)
    engine = Engine(max_num_batched_tokens=budget, max_num_running=1)
    engine.submit(spec, tokens_alone(spec)[0][:9])
    check(engine.serve(), spec, 9)


@pytest.mark.parametrize("depth", [1, 2])
def test_it_may_be_preempted_again(depth):
    specs = [
        make_spec(f"r{index}", [index] * 3, max_tokens=40, temperature=1.0, frequency_penalty=0.5)
        for index in range(4)
    ]
    cuts = [4, 1, 2, 3]
    engine = Engine(depth=depth, num_blocks=20)
    for spec, cut in zip(specs, cuts, strict=True):
        engine.submit(spec, tokens_alone(spec)[0][:cut])
    engine.serve()
    assert sum(event.num_preemptions > 0 for event in engine.events("finished")) > 1
    for spec, cut in zip(specs, cuts, strict=True):
        check(engine, spec, cut)


@pytest.mark.parametrize("cuts", [(0, 0), (3, 0), (0, 3), (4, 4), (7, 2)])
def test_choices_of_one_prompt_go_on_each_from_its_own_token(cuts):
    specs = [
        make_spec(f"r{choice}", range(20), max_tokens=10, temperature=1.0, seed=4, choice=choice)
        for choice in range(2)
    ]
    engine = Engine()
    for spec, cut in zip(specs, cuts, strict=True):
        engine.submit(spec, tokens_alone(spec)[0][:cut])
    engine.serve()
    for spec, cut in zip(specs, cuts, strict=True):
        check(engine, spec, cut)


def test_where_its_prefix_is_known_it_is_not_computed_again():
    spec = make_spec(prompt=range(40), max_tokens=12)
    engine = Engine()
    engine.submit(spec)
    engine.serve()
    computed = engine.scheduler.view().num_computed_tokens
    again = replace(spec, request_id=RequestId("again"))
    engine.submit(again, tokens_alone(spec)[0][:9])
    check(engine.serve(), again, 9)
    num_more = engine.scheduler.view().num_computed_tokens - computed
    assert num_more < 8, "the end of a block, and three tokens"


def test_a_stop_token_that_did_not_count_yet_does_not_end_it_later():
    spec = make_spec(prompt=PROMPT, max_tokens=12, min_tokens=6, stop_token_ids=EVERY_TOKEN)
    expected, reason = tokens_alone(spec)
    assert (len(expected), reason) == (7, FinishReason.STOP)
    for cut in range(7):
        engine = Engine()
        engine.submit(spec, expected[:cut])
        check(engine.serve(), spec, cut)


@pytest.mark.parametrize("num_given", [8, 9])
def test_it_is_refused_when_nothing_is_left_to_produce(num_given):
    scheduler, spec = make_scheduler(), make_spec(max_tokens=8)
    refused = scheduler.add(spec, 0.0, [1] * num_given)
    assert refused == RejectedEvent(spec.request_id, RejectReason.NEVER_FITS)
    assert not scheduler.has_work
    assert scheduler.add(spec, 0.0, [1] * 7) is None


def test_it_fits_wherever_it_would_have_fitted_from_the_start():
    """What it has counts as part of its answer, and not beside it."""
    spec = make_spec(prompt=range(9), max_tokens=8)
    for cut in range(8):
        engine = Engine(num_blocks=4, max_model_len=17)
        engine.submit(spec, tokens_alone(spec)[0][:cut])
        check(engine.serve(), spec, cut)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_decision_log_replays_it(tmp_path, depth):
    rng = random.Random(depth)
    engine = Engine(depth=depth, num_blocks=14, max_num_running=3)
    for index in range(20):
        spec = make_spec(f"r{index}", [index] * rng.randint(1, 12), max_tokens=rng.randint(2, 20))
        tokens = tokens_alone(spec)[0]
        engine.submit(spec, tokens[: rng.randrange(len(tokens))])
    engine.serve()
    path = tmp_path / "log"
    path.write_bytes(engine.log.getvalue())
    answers = list(replay(path))
    assert len(answers) > 50
    assert not any(answers)
