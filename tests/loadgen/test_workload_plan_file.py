"""A plan goes to a file and comes back equal; a file that is no plan is refused."""

from __future__ import annotations

import json

import pytest

from loadgen.types import LoadError, Session, Turn
from loadgen.workload.plan_file import is_plan, read_plan, write_plan

PLAN = (
    Session(
        start_at_s=0.1 + 0.2,
        turns=(
            Turn(prompt='say "é\u2028 字"\n\tand \ud800 too', num_prompt_tokens=12, max_tokens=3),
            Turn(prompt="", think_s=1 / 3),
        ),
    ),
    Session(
        start_at_s=1e6 / 7,
        turns=(Turn(prompt=(0, 5, 49151), num_prompt_tokens=3),),
        tenant="gold",
        priority=-1,
    ),
)


@pytest.mark.parametrize("name", ["plan.jsonl", "plan.jsonl.gz"])
def test_what_is_written_is_read_back_exactly(tmp_path, name):
    path = tmp_path / name
    write_plan(path, PLAN)
    assert is_plan(path)
    plan = read_plan(path)
    assert plan == PLAN
    assert type(plan[1].turns[0].prompt) is tuple


def test_a_packed_plan_does_not_say_when_it_was_written(tmp_path):
    path = tmp_path / "plan.jsonl.gz"
    write_plan(path, PLAN)
    assert path.read_bytes()[4:8] == bytes(4)


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "plan.jsonl"
    write_plan(path, PLAN[1:])
    header, session = map(json.loads, path.read_text().splitlines())
    assert header == {"loadgen_plan": 1, "num_sessions": 1}
    assert session == {
        "start_at_s": 1e6 / 7,
        "tenant": "gold",
        "priority": -1,
        "turns": [
            {
                "prompt": [0, 5, 49151],
                "num_prompt_tokens": 3,
                "max_tokens": 128,
                "think_s": 0.0,
            }
        ],
    }


def nested(depth):
    return [nested(depth - 1)] if depth else []


def lines(edit=None, header=None):
    """The rows of a good file of one session, after an edit of the session."""
    turn = {"prompt": "a", "num_prompt_tokens": None, "max_tokens": 1, "think_s": 0}
    session = {"start_at_s": 0.5, "tenant": "a", "priority": None, "turns": [turn]}
    (edit or (lambda *_: None))(session, turn)
    return [header or {"loadgen_plan": 1, "num_sessions": 1}, session]


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([], "line 1: not the header"),
        (lines(header={"loadgen_plan": 2, "num_sessions": 1}), "line 1: not the header"),
        (lines(header={"timestamp": 2}), "line 1: not the header"),
        (lines()[:1], "holds 0 sessions, its header says 1"),
        (lines(header={"loadgen_plan": 1, "num_sessions": 0})[:1], "holds 0 sessions"),
        ([*lines(), lines()[1]], "holds 2 sessions, its header says 1"),
        ([*lines(), lines(lambda it, _: it.update(start_at_s=0.1))[1]], "line 3: starts before"),
        (lines(lambda it, _: it.pop("tenant")), "line 2: no field 'tenant'"),
        (lines(lambda it, _: it.update(turns=[])), "line 2: a session needs a turn"),
        (lines(lambda it, _: it.update(start_at_s=-1)), "-1 is not a time"),
        (lines(lambda it, _: it.update(start_at_s=True)), "True is not a time"),
        (lines(lambda it, _: it.update(priority="high")), "'high' should be of type int"),
        (lines(lambda _, turn: turn.update(prompt=5)), "5 should be of type str"),
        (lines(lambda _, turn: turn.update(prompt=[1, "a"])), "'a' should be of type int"),
        (lines(lambda _, turn: turn.update(max_tokens=1.5)), "1.5 should be of type int"),
        (lines(lambda _, turn: turn.pop("think_s")), "no field 'think_s'"),
        (lines(lambda _, turn: turn.update(max_tokens=-3)), "max_tokens is -3"),
        (lines(lambda _, turn: turn.update(max_tokens=10**9)), "max_tokens is 1000000000"),
        (lines(lambda _, turn: turn.update(think_s=10**400)), "line 2: "),
        (lines(lambda _, turn: turn.update(prompt=nested(900))), "line 2: "),
    ],
)
def test_what_is_no_plan_is_refused_with_its_line(tmp_path, rows, cause):
    path = tmp_path / "plan.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LoadError) as caught:
        read_plan(path)
    assert cause in caught.value.cause
    assert str(path) in caught.value.cause


def test_a_line_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text('{"loadgen_plan": 1, "num_sessions": 1}\n' + "[" * 5000 + "]" * 5000)
    with pytest.raises(LoadError, match="line 2: nested too deeply"):
        read_plan(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    write_plan(path, PLAN)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LoadError, match="line 3: not JSON"):
        read_plan(path)


def test_other_files_are_no_plans(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0}\n')
    assert not is_plan(path)
    path.write_text("")
    assert not is_plan(path)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(LoadError, match="cannot be written: No such file"):
        write_plan(tmp_path / "absent" / "plan.jsonl", PLAN)
