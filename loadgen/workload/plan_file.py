"""A plan as a file: what is sent can be kept, looked at, and sent again exactly.

JSON lines, gzip if the name ends in .gz. The first line is

    {"loadgen_plan": 1, "num_sessions": N}

where 1 is the version of the format, and each of the N others is a session, in order of time:

    {"start_at_s": 0.25, "tenant": "gold", "priority": null, "turns": [
        {"prompt": "text" or [token ids], "num_prompt_tokens": 12 or null,
         "max_tokens": 128, "think_s": 0.0}, ...]}

Of a conversation, `prompt` is what the user says in that turn; the answers are not in the plan.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from loadgen.shown import plain
from loadgen.types import LoadError, Plan, Prompt, Session, Turn
from loadgen.workload.lengths import MOST_TOKENS
from loadgen.workload.lines import read_lines

VERSION = 1
_T = TypeVar("_T", int, str)
_MARK = "loadgen_plan"
_REMEDY = "write the plan again"


def write_plan(path: Path, plan: Plan) -> None:
    """Write all of a plan, in place of what was there. Raises LoadError if that cannot be."""
    lines = [{_MARK: VERSION, "num_sessions": len(plan)}, *(_session_row(it) for it in plan)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise LoadError(
            f"{path} cannot be written: {error.strerror}", "name a file in a folder you can write"
        ) from error


def is_plan(path: Path) -> bool:
    """Whether the file begins as a plan does. Raises LoadError if it cannot be read."""
    _, line = next(read_lines(path), (0, ""))
    return line.startswith("{") and f'"{_MARK}"' in line


def read_plan(path: Path) -> Plan:
    """Read back what `write_plan` wrote, equal to the plan that was given to it.

    Raises LoadError for a file that is missing, cut short, of another version or no plan.
    """
    lines = read_lines(path)
    number, line = next(lines, (1, "null"))
    header = _parse(path, number, line)
    if not isinstance(header, dict) or header.get(_MARK) != VERSION:
        raise LoadError(
            f"{path}, line {number}: not the header of a plan of version {VERSION}",
            "give a file that this version recorded",
        )
    plan: list[Session] = []
    for number, line in lines:
        session = _session(path, number, _parse(path, number, line))
        if plan and session.start_at_s < plan[-1].start_at_s:
            raise LoadError(f"{path}, line {number}: starts before the session above it", _REMEDY)
        plan.append(session)
    if len(plan) != header.get("num_sessions") or not plan:
        raise LoadError(
            f"{path} holds {len(plan)} sessions, its header says {header.get('num_sessions')}",
            _REMEDY,
        )
    return tuple(plan)


def _session_row(session: Session) -> dict[str, Any]:
    return {
        "start_at_s": session.start_at_s,
        "tenant": session.tenant,
        "priority": session.priority,
        "turns": [
            {
                "prompt": turn.prompt,
                "num_prompt_tokens": turn.num_prompt_tokens,
                "max_tokens": turn.max_tokens,
                "think_s": turn.think_s,
            }
            for turn in session.turns
        ],
    }


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise LoadError(f"{path}, line {number}: not JSON ({error})", _REMEDY) from error
    except RecursionError as error:
        raise LoadError(f"{path}, line {number}: nested too deeply", _REMEDY) from error


def _session(path: Path, number: int, row: Any) -> Session:
    try:
        turns = tuple(_turn(turn) for turn in row["turns"])
        if not turns:
            raise ValueError("a session needs a turn")
        return Session(
            start_at_s=_seconds(row["start_at_s"]),
            turns=turns,
            tenant=_of(str, row["tenant"]),
            priority=_or_none(row["priority"]),
        )
    except KeyError as error:
        cause = f"no field {error}"
    except (TypeError, ValueError, OverflowError) as error:
        cause = str(error)
    raise LoadError(f"{path}, line {number}: {plain(cause, 200)}", _REMEDY)


def _turn(row: Any) -> Turn:
    return Turn(
        prompt=_prompt(row["prompt"]),
        num_prompt_tokens=_or_none(row["num_prompt_tokens"]),
        max_tokens=_max_tokens(row["max_tokens"]),
        think_s=_seconds(row["think_s"]),
    )


def _prompt(value: Any) -> Prompt:
    return tuple(_of(int, token) for token in value) if type(value) is list else _of(str, value)


def _max_tokens(value: Any) -> int:
    max_tokens = _of(int, value)
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens is {max_tokens}, and not from 1 to {MOST_TOKENS:,}")
    return max_tokens


def _or_none(value: Any) -> int | None:
    return None if value is None else _of(int, value)


def _seconds(value: Any) -> float:
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a time in seconds")
    return float(value)


def _of(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise ValueError(f"{value!r} should be of type {kind.__name__}")
    return value
