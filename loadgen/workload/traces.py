"""Published traces: when requests came, and how many tokens they read and wrote.

Three formats, told apart by their first line, plain or .gz:

    Azure 2023, 2024   CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, a date and time
    BurstGPT           CSV `Timestamp,Model,Request tokens,Response tokens,...`, seconds
    Mooncake           JSON lines {timestamp (ms), input_length, output_length, hash_ids}, an id
                       for each block of 512 tokens, the last one perhaps not full

A request that wrote nothing had failed; it is left out and counted.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from loadgen.shown import plain
from loadgen.types import LoadError
from loadgen.workload.lengths import MOST_TOKENS, fit_context
from loadgen.workload.lines import read_lines

MOONCAKE_BLOCK_TOKENS = 512
_LEAST_SPEED = 1e-9
_MOST_CHARS = 64  # of a number in a column
_TOO_LONG = f"a length of more than {MOST_TOKENS:,} tokens"
_KNOWN = (
    "give an Azure or BurstGPT CSV with its header, Mooncake JSON lines, or a plan this tool wrote"
)


class TraceRequest(NamedTuple):
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of time, and what was changed about them."""

    path: Path
    requests: tuple[TraceRequest, ...]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    num_failed: int = 0  # left out
    num_shortened: int = 0  # to the context


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The part of a trace that is replayed, and how."""

    start_s: float = 0.0  # in the trace's own time
    duration_s: float | None = None  # of the run: at speed 2 it takes twice of the trace
    num_requests: int | None = None
    speed: float = 1.0  # 0.5: half as many requests a second
    divisor: int = 1  # of all lengths, and of the block size
    max_context: int | None = None  # tokens of prompt and answer together


def read_trace(path: Path) -> Trace:
    """Read a whole trace; its first request came at 0.

    Raises LoadError for a file that is missing, of another format, without requests, or with a
    line that cannot be read.
    """
    lines = read_lines(path)
    number, first = next(lines, (0, ""))
    if not first:
        raise LoadError(f"{path} holds no request", _KNOWN)
    if first.lstrip().startswith("{"):
        requests = [_read(path, number, first, _mooncake)]
        requests += [_read(path, number, line, _mooncake) for number, line in lines]
    else:
        requests = list(_read_csv(path, number, first, lines))
    ok = sorted((it for it in requests if it.num_output_tokens), key=lambda it: it.at_s)
    if not ok:
        raise LoadError(f"{path} holds no request", _KNOWN)
    zero_s = ok[0].at_s
    return Trace(
        path=path,
        requests=tuple(it._replace(at_s=it.at_s - zero_s) for it in ok),
        num_failed=len(requests) - len(ok),
    )


def cut_trace(trace: Trace, part: Slice) -> Trace:
    """Return the part of a trace as it is to be replayed, from 0 on. Raises LoadError if empty."""
    if part.divisor < 1 or (has_blocks(trace) and trace.block_tokens % part.divisor):
        raise LoadError(
            f"lengths cannot be divided by {part.divisor}",
            f"give a whole number; for a trace with blocks one that divides {trace.block_tokens}",
        )
    if not _LEAST_SPEED <= part.speed <= 1 / _LEAST_SPEED:
        raise LoadError(f"a trace has no speed {part.speed:g}", "give a number above 0, such as 1")
    end_s = math.inf if part.duration_s is None else part.start_s + part.duration_s * part.speed
    chosen = [it for it in trace.requests if part.start_s <= it.at_s < end_s][: part.num_requests]
    if not chosen:
        raise LoadError(
            f"{trace.path} holds no request from {part.start_s:g} to {end_s:g} s",
            f"it ends at {trace.requests[-1].at_s:.0f} s: choose a start before, and a duration",
        )
    block_tokens = max(trace.block_tokens // part.divisor, 1)
    divided = [_divided(it, part) for it in chosen]
    fitted = [_fitted(it, part.max_context, block_tokens) for it in divided]
    return replace(
        trace,
        requests=tuple(fitted),
        block_tokens=block_tokens,
        num_shortened=sum(it != was for it, was in zip(fitted, divided, strict=True)),
    )


def has_blocks(trace: Trace) -> bool:
    return bool(trace.requests[0].block_ids)


def _fitted(request: TraceRequest, max_context: int | None, block_tokens: int) -> TraceRequest:
    """Shorten a request to the context.

    A prompt with blocks then ends with a whole one, as a name stands for all of its block.
    """
    num_prompt, num_output = fit_context(
        request.num_prompt_tokens, request.num_output_tokens, max_context
    )
    if request.block_ids and block_tokens < num_prompt < request.num_prompt_tokens:
        num_prompt -= num_prompt % block_tokens
    return request._replace(
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        block_ids=request.block_ids[: math.ceil(num_prompt / block_tokens)],
    )


def _divided(request: TraceRequest, part: Slice) -> TraceRequest:
    """Divide, rounding up: so a prompt has as many blocks as before."""
    return request._replace(
        at_s=(request.at_s - part.start_s) / part.speed,
        num_prompt_tokens=math.ceil(request.num_prompt_tokens / part.divisor),
        num_output_tokens=math.ceil(request.num_output_tokens / part.divisor),
    )


def _read_csv(
    path: Path, number: int, header: str, lines: Iterator[tuple[int, str]]
) -> Iterator[TraceRequest]:
    columns = [column.strip() for column in header.split(",")]
    names = next((names for names in _SECONDS if set(names) <= set(columns)), None)
    if names is None:
        raise LoadError(f"{path}, line {number}: no known trace begins like this", _KNOWN)
    places = [columns.index(name) for name in names]
    seconds = _SECONDS[names]

    def parse(line: str) -> TraceRequest:
        cells = next(csv.reader([line]))
        at, num_prompt, num_output = (cells[place] for place in places)
        return TraceRequest(seconds(at), _length(num_prompt), _length(num_output))

    for line_number, line in lines:
        yield _read(path, line_number, line, parse)


def _mooncake(line: str) -> TraceRequest:
    row = json.loads(line)
    num_prompt, block_ids = row["input_length"], tuple(row["hash_ids"])
    if any(type(it) is not int for it in (num_prompt, row["output_length"], *block_ids)):
        raise ValueError("a length or an id is not a whole number")
    if num_prompt > MOST_TOKENS:
        raise ValueError(_TOO_LONG)
    if len(block_ids) != math.ceil(num_prompt / MOONCAKE_BLOCK_TOKENS) or min(block_ids) < 0:
        raise ValueError(f"{len(block_ids)} hash_ids do not make {num_prompt} tokens")
    return TraceRequest(row["timestamp"] / 1000, num_prompt, row["output_length"], block_ids)


def _read(path: Path, number: int, line: str, parse: Callable[[str], TraceRequest]) -> TraceRequest:
    try:
        request = parse(line)
        if request.num_prompt_tokens < 1 or request.num_output_tokens < 0:
            raise ValueError("a prompt needs a token, and no length is negative")
        if max(request.num_prompt_tokens, request.num_output_tokens) > MOST_TOKENS:
            raise ValueError(_TOO_LONG)
        if not math.isfinite(request.at_s):
            raise ValueError("the time is not finite")
    except KeyError as error:
        cause = f"no field {error}"
    except IndexError:
        cause = "too few columns"
    except RecursionError:
        cause = "nested too deeply"
    except (TypeError, ValueError, OverflowError, csv.Error) as error:
        cause = str(error)
    else:
        return request
    raise LoadError(f"{path}, line {number}: {plain(cause, 200)}", "mend or remove this line")


def _length(text: str) -> int:
    if len(text) > _MOST_CHARS and text.strip().isdecimal():
        raise ValueError(_TOO_LONG)
    return int(text)


def _date_s(text: str) -> float:
    date = datetime.fromisoformat(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


# The columns of each CSV format (time, prompt, answer), and how it writes the time.
_SECONDS: dict[tuple[str, ...], Callable[[str], float]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _date_s,
    ("Timestamp", "Request tokens", "Response tokens"): float,
}
