"""Every decision of one instance as a file, and the same decisions made again from it.

A line is what the scheduler was asked, with the time, and what it answered. As the scheduler is
pure, `replay` asks a fresh one the same and compares the answers byte for byte: a trace from
production is a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from scheduler.config import InstanceConfig
from scheduler.instance.plan import StepPlan, StepResult
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.load import InstanceView
from scheduler.types import (
    FinishedEvent,
    KVGeometry,
    RejectedEvent,
    RequestEvent,
    RequestId,
    RequestSpec,
)


class _Line(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Begun(_Line, frozen=True):
    """The first line: what the scheduler was made with."""

    config: InstanceConfig
    geometry: KVGeometry


class Added(_Line, frozen=True):
    now: float
    spec: RequestSpec
    answer: msgspec.Raw


class Aborted(_Line, frozen=True):
    request_id: RequestId
    answer: msgspec.Raw


class Planned(_Line, frozen=True):
    now: float
    answer: msgspec.Raw


class Completed(_Line, frozen=True):
    result: StepResult
    answer: msgspec.Raw


_Entry = Begun | Added | Aborted | Planned | Completed
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[_Entry] = msgspec.json.Decoder(_Entry)


class RecordingScheduler:
    """An instance scheduler that writes down what it is asked and answers."""

    def __init__(self, config: InstanceConfig, geometry: KVGeometry, file: BinaryIO) -> None:
        self._inner = InstanceScheduler(config, geometry)
        self._file = file
        self._write(Begun(config, geometry))

    def add(self, spec: RequestSpec, now: float) -> RejectedEvent | None:
        answer = self._inner.add(spec, now)
        self._write(Added(now, spec, _raw(answer)))
        return answer

    def abort(self, request_id: RequestId) -> FinishedEvent | None:
        answer = self._inner.abort(request_id)
        self._write(Aborted(request_id, _raw(answer)))
        return answer

    def plan_step(self, now: float) -> StepPlan | None:
        answer = self._inner.plan_step(now)
        self._write(Planned(now, _raw(answer)))
        return answer

    def complete_step(self, result: StepResult) -> list[RequestEvent]:
        answer = self._inner.complete_step(result)
        self._write(Completed(result, _raw(answer)))
        return answer

    def view(self) -> InstanceView:
        return self._inner.view()

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    def _write(self, entry: _Entry) -> None:
        self._file.write(_encoder.encode(entry) + b"\n")


class Difference(msgspec.Struct, frozen=True):
    """A line to which a fresh scheduler gives another answer."""

    line: int
    asked: str
    recorded: bytes
    replayed: bytes


def replay(path: Path) -> Iterator[Difference | None]:
    """Yield, for each decision of the log, None if it is made again the same, else the difference.

    Raises ValueError for a file that is no decision log. A last line that was cut off, as by a
    process that was killed, is left out.
    """
    with path.open("rb") as file:
        lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        begun = _decoder.decode(lines[0])
        assert isinstance(begun, Begun)
    except (IndexError, AssertionError, msgspec.DecodeError) as error:
        raise ValueError(f"{path} is no decision log") from error
    scheduler = InstanceScheduler(begun.config, begun.geometry)
    for number, line in enumerate(lines[1:], start=2):
        entry = _decoder.decode(line)
        assert not isinstance(entry, Begun)
        replayed = _encoder.encode(_ask(scheduler, entry))
        recorded = bytes(entry.answer)
        asked = type(entry).__name__
        same = replayed == recorded
        yield None if same else Difference(number, asked, recorded, replayed)


def _ask(scheduler: InstanceScheduler, entry: _Entry) -> object:
    match entry:
        case Added(now, spec):
            return scheduler.add(spec, now)
        case Aborted(request_id):
            return scheduler.abort(request_id)
        case Planned(now):
            return scheduler.plan_step(now)
        case Completed(result):
            return scheduler.complete_step(result)
        case Begun():
            raise ValueError("a decision log begins once")


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(value))
