"""The decision log: replayed without a difference, and byte for byte the same for the same seed."""

from __future__ import annotations

import io
import os
import random
import re

import pytest

from engine.build import build_engine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.decision_log import RecordingScheduler, new_log, replay
from engine.messages import Abort, Submit
from engine.startup import CannotStart, StartupTimes
from scheduler.costs import StepCosts
from scheduler.instance.plan import StepResult
from scheduler.request import InvariantError
from scheduler.types import RequestId
from serving.progress import NoProgress
from tests.factories import VOCAB_SIZE, make_config, make_executor, make_geometry, make_spec

COSTS = StepCosts(dense=((1, 0.3), (3, 0.35), (9, 1.0)), visit_s=0.001)


def record(seed: int, depth: int, **settings) -> bytes:
    """Run a mixed load on a manual clock and return its log. Steps are slower than they should."""
    rng = random.Random(seed)
    file = io.BytesIO()
    config = make_config(max_num_running=4, **settings)
    scheduler = RecordingScheduler(config, make_geometry(12), file, COSTS)
    now = [0.0]
    slower = StepCosts.linear(fixed_s=0.4, token_s=0.1)
    executor = make_executor(12, cost=slower, clock=lambda: 0.0, sleep=lambda _: None)
    core = EngineCore(scheduler, executor, lambda _: None, depth=depth, clock=lambda: now[0])
    for index in range(60):
        core.inbox.put(
            Submit(
                make_spec(
                    f"r{index}",
                    prompt=[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))],
                    max_tokens=rng.randint(1, 25),
                    stop_token_ids=(rng.randrange(VOCAB_SIZE),),
                )
            )
        )
        if rng.random() < 0.2:
            core.inbox.put(Abort(RequestId(f"r{rng.randrange(index + 1)}")))
        for _ in range(rng.randint(1, 6)):
            now[0] += rng.random()
            if scheduler.has_work or not core.inbox.empty():
                core.turn()
    while scheduler.has_work:
        core.turn()
    return file.getvalue()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_log_replays_without_a_difference(tmp_path, depth):
    path = tmp_path / "log"
    path.write_bytes(record(seed=3, depth=depth))
    answers = list(replay(path))
    assert len(answers) > 300
    assert not any(answers)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_costs_and_the_times_of_steps_are_in_the_log(tmp_path, depth):
    """So what the time of a step decided is decided again; with other times it would not be."""
    path = tmp_path / "log"
    limited = record(seed=3, depth=depth, max_step_s=0.9, min_prompt_tokens=1)
    path.write_bytes(limited)
    answers = list(replay(path))
    assert len(answers) > 300
    assert not any(answers)
    path.write_bytes(re.sub(rb'"duration_s":[0-9.e-]+', b'"duration_s":0.0', limited))
    assert any(replay(path))
    path.write_bytes(limited.replace(b'"dense":[[1,0.3]', b'"dense":[[1,0.0]', 1))
    assert any(replay(path))


def test_the_same_seed_makes_the_same_log_byte_for_byte():
    assert record(seed=5, depth=2) == record(seed=5, depth=2)
    assert record(seed=5, depth=2) != record(seed=6, depth=2)


def test_a_changed_decision_is_found(tmp_path):
    path = tmp_path / "log"
    lines = record(seed=3, depth=1).splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if line.startswith(b'["Planned"') and i > 50)
    lines[index] = lines[index].replace(b'"step_id":', b'"step_id":1')
    path.write_bytes(b"".join(lines))
    differences = [answer for answer in replay(path) if answer]
    assert [difference.line for difference in differences] == [index + 1]


def test_decisions_of_another_state_are_compared_until_one_raises(tmp_path):
    path = tmp_path / "log"
    lines = record(seed=3, depth=1).splitlines(keepends=True)
    lines[0] = lines[0].replace(b'"max_num_running":4', b'"max_num_running":3')
    path.write_bytes(b"".join(lines))
    answers = list(replay(path))
    differences = [answer for answer in answers if answer]
    assert differences
    assert b"raised" in differences[-1].replayed
    assert len(answers) < len(lines) - 1


def test_what_raises_is_written_down_and_raises_again(tmp_path):
    file = io.BytesIO()
    scheduler = RecordingScheduler(make_config(), make_geometry(), file)
    scheduler.add(make_spec("a"), 0.0)
    with pytest.raises(InvariantError):
        scheduler.complete_step(StepResult(step_id=7, sampled=()))
    assert (
        file.getvalue()
        .splitlines()[-1]
        .endswith(b'{"raised":"InvariantError: step 7 is not in flight"}]')
    )
    path = tmp_path / "log"
    path.write_bytes(file.getvalue())
    assert list(replay(path)) == [None, None]


def test_a_full_disk_ends_the_log_and_not_the_instance():
    class Full(io.BytesIO):
        def write(self, data):
            if self.getvalue():
                raise OSError(28, "No space left on device")
            return super().write(data)

    scheduler = RecordingScheduler(make_config(), make_geometry(), Full())
    assert scheduler.add(make_spec("a"), 0.0) is None
    assert scheduler.plan_step(0.0) is not None


def test_a_log_is_never_written_over_an_older_one(tmp_path):
    path = tmp_path / "log"
    path.write_text("of the crash that is to be understood")
    config = EngineConfig(model_name="fake", model_folder=None, decision_log=path)
    with pytest.raises(CannotStart, match="cannot be written: File exists"):
        build_engine(config, StartupTimes(NoProgress()), lambda _: None)
    assert path.read_text() == "of the crash that is to be understood"


def test_only_its_owner_may_read_a_log(tmp_path):
    """It holds every prompt as token ids."""
    with new_log(tmp_path / "log") as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600


def test_a_second_beginning_is_refused(tmp_path):
    path = tmp_path / "log"
    log = record(seed=3, depth=1)
    path.write_bytes(log + log)
    with pytest.raises(ValueError, match="begins another log"):
        list(replay(path))


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log"
    whole = record(seed=3, depth=1)
    path.write_bytes(whole[:-7])
    assert not any(replay(path))


@pytest.mark.parametrize("text", ["", "hello\n", '["Planned",0.0,null]\n'])
def test_what_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no decision log"):
        list(replay(path))
