"""Every decision of one instance as a file, and the same decisions made again from it.

A line is what the scheduler was asked, with the time, and what it answered. As the scheduler is
pure, `replay` asks a fresh one the same and compares the answers byte for byte: a trace from
production is a test. The prompts of requests are in it, as token ids.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from scheduler.config import InstanceConfig
from scheduler.costs import StepCosts
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

log = logging.getLogger(__name__)
T = TypeVar("T")


class _Line(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Begun(_Line, frozen=True):
    """The first line: what the scheduler was made with."""

    config: InstanceConfig
    geometry: KVGeometry
    costs: StepCosts | None = None


class Added(_Line, frozen=True):
    now: float
    spec: RequestSpec
    answer: msgspec.Raw
    output_token_ids: tuple[int, ...] = ()  # of one that was begun elsewhere


class Aborted(_Line, frozen=True):
    request_id: RequestId
    num_output_tokens: int | None
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


def new_log(path: Path) -> BinaryIO:
    """Return a new file that only its owner may read. Raises OSError, also if there is one.

    Never over an old one: it may be the log of the crash that is to be understood. Unbuffered: what
    a killed process decided is what its log is read for.
    """
    return open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))


class RecordingScheduler:
    """An instance scheduler that writes down what it is asked and answers.

    Making it writes the first line; raises OSError if that cannot be done.
    """

    def __init__(
        self,
        config: InstanceConfig,
        geometry: KVGeometry,
        file: BinaryIO,
        costs: StepCosts | None = None,
    ) -> None:
        self._inner = InstanceScheduler(config, geometry, costs)
        self._file: BinaryIO | None = file
        file.write(_encoder.encode(Begun(config, geometry, costs)) + b"\n")

    def add(
        self, spec: RequestSpec, now: float, output_token_ids: Sequence[int] = ()
    ) -> RejectedEvent | None:
        return self._record(
            lambda: self._inner.add(spec, now, output_token_ids),
            lambda answer: Added(now, spec, answer, tuple(output_token_ids)),
        )

    def abort(
        self, request_id: RequestId, num_output_tokens: int | None = None
    ) -> FinishedEvent | None:
        return self._record(
            lambda: self._inner.abort(request_id, num_output_tokens),
            lambda answer: Aborted(request_id, num_output_tokens, answer),
        )

    def plan_step(self, now: float) -> StepPlan | None:
        return self._record(lambda: self._inner.plan_step(now), lambda answer: Planned(now, answer))

    def complete_step(self, result: StepResult) -> list[RequestEvent]:
        return self._record(
            lambda: self._inner.complete_step(result), lambda answer: Completed(result, answer)
        )

    def check_idle(self) -> None:
        self._inner.check_idle()

    def view(self) -> InstanceView:
        return self._inner.view()

    def state(self) -> dict[str, Any]:
        return self._inner.state()

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    def _record(self, ask: Callable[[], T], entry: Callable[[msgspec.Raw], _Entry]) -> T:
        """Ask, and write down the answer; what raises is an answer too, and the last one."""
        try:
            answer = ask()
        except Exception as error:
            self._write(entry(_raw(_raised(error))))
            raise
        self._write(entry(_raw(answer)))
        return answer

    def _write(self, entry: _Entry) -> None:
        """A log that cannot be written any more ends; the instance goes on without."""
        if self._file is None:
            return
        try:
            self._file.write(_encoder.encode(entry) + b"\n")
        except OSError as error:
            log.error("the decision log ends here, it cannot be written: %s", error)
            self._file = None


class Difference(msgspec.Struct, frozen=True):
    """A line to which a fresh scheduler gives another answer."""

    line: int
    asked: str
    recorded: bytes
    replayed: bytes


def replay(path: Path) -> Iterator[Difference | None]:
    """Yield, for each decision of the log, None if it is made again the same, else the difference.

    Ends where a decision raises, as it may when it is made from another state than the recorded
    one. Raises ValueError for a file that is no decision log. A last line that was cut off, as by a
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
    scheduler = InstanceScheduler(begun.config, begun.geometry, begun.costs)
    for number, line in enumerate(lines[1:], start=2):
        entry = _decoder.decode(line)
        if isinstance(entry, Begun):
            raise ValueError(f"line {number} begins another log")
        ended = False
        try:
            answer = _ask(scheduler, entry)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the answer)
            answer, ended = _raised(error), True
        replayed, recorded = _encoder.encode(answer), bytes(entry.answer)
        same = replayed == recorded
        yield None if same else Difference(number, type(entry).__name__, recorded, replayed)
        if ended:
            return


def _ask(scheduler: InstanceScheduler, entry: Added | Aborted | Planned | Completed) -> object:
    match entry:
        case Added(now, spec, _, output_token_ids):
            return scheduler.add(spec, now, output_token_ids)
        case Aborted(request_id, num_output_tokens):
            return scheduler.abort(request_id, num_output_tokens)
        case Planned(now):
            return scheduler.plan_step(now)
        case Completed(result):
            return scheduler.complete_step(result)


def _raised(error: Exception) -> dict[str, str]:
    return {"raised": f"{type(error).__name__}: {error}"}


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(value))
