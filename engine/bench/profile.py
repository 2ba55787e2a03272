"""Where a step goes: plan, pack, kernels, sample, send; a table and a trace.

Owns the watches that are put around the parts of one instance, the loop's own; the parts know
nothing of them. Requests decode side by side with the real scheduler; reports are encoded and go
through a socket, as from an instance's process.
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine import machine
from engine.backend import Backend, backend_of, load_best
from engine.batch import PersistentBatch
from engine.bench.steps import geometry
from engine.config import BLOCK_SIZE
from engine.core import EngineCore
from engine.executors.sequential import SequentialExecutor
from engine.forward import by_slices
from engine.messages import Report, StepEvents, Submit
from engine.models.slices import DenseSlices
from engine.startup import Progress
from scheduler.config import InstanceConfig
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import RequestId, RequestSpec, SamplingParams

PHASES = ("plan", "pack", "kernels", "sample", "complete", "send", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How many requests decode, behind prompts of how many tokens, for how many steps."""

    batch: Sequence[int] = (1, 8, 32)
    context: int = 256
    steps: int = 60
    temperature: float = 0.0
    trace: Path | None = None


@dataclass(slots=True)
class Watch:
    """Adds up seconds by phase, and keeps each span for a trace."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)

    def around(self, phase: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                end_s = time.perf_counter()
                self.seconds[phase] += end_s - began_s
                self.spans.append((phase, name, began_s, end_s))

        return watched


class _Watched:
    """An object of which some methods are watched; everything else is the object's own."""

    def __init__(self, watch: Watch, inner: Any, phases: dict[str, str]) -> None:
        self._inner = inner
        for name, phase in phases.items():
            setattr(self, name, watch.around(phase, name, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def main(folder: Path, dtype: str, choices: Choices, progress: Progress) -> str:
    """Measure the model in `folder`; return the table. Writes the trace if one is asked for."""
    num_threads = machine.num_usable_cores()
    torch.set_num_threads(num_threads)
    progress.phase("reading weights", None)
    model, kernels = load_best(folder, dtype)
    lines = [
        f"{folder.name}, {str(model.shape.dtype).removeprefix('torch.')}, context"
        f" {choices.context}, temperature {choices.temperature:g}, kernels"
        f" {kernels}, {num_threads}"
        f" threads, {choices.steps} steps; ms of a step, mean",
        "",
        f"{'batch':<8}{'step':>9}"
        + "".join(f"{phase:>10}" for phase in PHASES)
        + f"{'not kernels':>14}",
    ]
    progress.phase("measuring", len(choices.batch))
    events: list[dict[str, Any]] = []
    for index, batch in enumerate(choices.batch):
        watch, turns = _measure(model, batch, choices)
        mean_ms = 1000 * statistics.fmean(turns)
        phases_ms = {name: 1000 * s / len(turns) for name, s in watch.seconds.items()}
        phases_ms["other"] = mean_ms - sum(phases_ms.values())
        rest = 1 - phases_ms["kernels"] / mean_ms
        lines.append(
            f"{batch:<8}{mean_ms:>9.2f}"
            + "".join(f"{phases_ms.get(phase, 0.0):>10.3f}" for phase in PHASES)
            + f"{rest:>14.1%}"
        )
        events += _trace(watch, batch)
        progress.advance(index + 1)
    if choices.trace is not None:
        choices.trace.write_text(json.dumps({"traceEvents": events}))
        lines += ["", f"trace: {choices.trace}, for chrome://tracing or https://ui.perfetto.dev"]
    return "\n".join(lines)


def _measure(model: DenseSlices, batch: int, choices: Choices) -> tuple[Watch, list[float]]:
    """Return what was watched, and the seconds of each turn of the loop that decoded only."""
    max_model_len = choices.context + choices.steps + 2 * BLOCK_SIZE
    room = geometry(model.shape, batch, max_model_len)
    watch, backend = Watch(), backend_of(model, room)
    executor = _executor(watch, model, backend, batch, max_model_len)
    settings = InstanceConfig(
        max_model_len=max_model_len,
        max_num_batched_tokens=max(512, batch),
        max_num_running=batch,
        max_num_waiting=batch,
        prefix_caching=False,
    )
    scheduler = _Watched(
        watch,
        InstanceScheduler(settings, room),
        {"plan_step": "plan", "complete_step": "complete", "view": "complete"},
    )
    here, there = socket.socketpair()
    reader = threading.Thread(target=_drain, args=(there,), daemon=True)
    reader.start()
    encoder, num_tokens = msgspec.msgpack.Encoder(), [0]

    def send(report: Report) -> None:
        if isinstance(report, StepEvents):
            num_tokens[0] = len(report.tokens)
        here.sendall(encoder.encode(report))

    core = EngineCore(scheduler, executor, watch.around("send", "send", send))
    for number in range(batch):
        prompt = tuple((7 * index + number) % 1000 for index in range(choices.context))
        params = SamplingParams(
            max_tokens=choices.steps + BLOCK_SIZE,
            temperature=choices.temperature,
            seed=number,
        )
        core.inbox.put(
            Submit(
                RequestSpec(
                    request_id=RequestId(str(number)), prompt_token_ids=prompt, params=params
                )
            )
        )
    while num_tokens[0] < batch:
        core.turn()
    watch.seconds.clear()
    watch.spans.clear()
    turns = []
    for _ in range(choices.steps - 1):
        began_s = time.perf_counter()
        core.turn()
        turns.append(time.perf_counter() - began_s)
    here.close()
    reader.join()
    there.close()
    return watch, turns


def _executor(
    watch: Watch, model: DenseSlices, backend: Backend, batch: int, max_model_len: int
) -> SequentialExecutor:
    forward = backend.forward or by_slices(model, backend.attention)
    slices: Any = _Watched(watch, model, {"last": "kernels"})
    attention: Any = _Watched(watch, backend.attention, {"prepare": "pack"})
    persistent: Any = _Watched(
        watch,
        PersistentBatch(batch, max_model_len, BLOCK_SIZE),
        {"apply": "pack", "record": "pack"},
    )
    rows: Any = _Watched(
        watch, backend.rows, {"peaks": "sample", "are_finite": "sample", "sample": "sample"}
    )
    return SequentialExecutor(
        slices,
        attention,
        backend.cache,
        persistent,
        rows=rows,
        forward=watch.around("kernels", "forward", forward),
    )


def _drain(end: socket.socket) -> None:
    while end.recv(1 << 16):
        pass


def _trace(watch: Watch, batch: int) -> list[dict[str, Any]]:
    """Return the spans as events of Chrome's trace format, one process for each batch size."""
    return [
        {
            "name": name,
            "cat": phase,
            "ph": "X",
            "ts": 1e6 * began_s,
            "dur": 1e6 * (end_s - began_s),
            "pid": f"batch {batch}",
            "tid": "engine",
        }
        for phase, name, began_s, end_s in watch.spans
    ]
