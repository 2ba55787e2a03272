"""`hocket profile`: the times of a model's steps, as a file and as a table."""

from __future__ import annotations

from pathlib import Path

import torch

from engine import machine
from engine.backend import backend_of, load_best
from engine.batch import PersistentBatch
from engine.bench.steps import geometry
from engine.config import BLOCK_SIZE
from engine.executors.sequential import SequentialExecutor
from engine.profile import Profile, What
from engine.startup import Progress
from engine.step_times import FITTED, HELD_OUT, Stand, measure, profile_of

_NUM_ROWS, _NUM_ROW_TOKENS = 33, 2176


def main(folder: Path, dtype: str, rounds: int, progress: Progress) -> Profile:
    """Measure the model in `folder`. Raises what loading a model raises."""
    num_threads = machine.num_usable_cores()
    torch.set_num_threads(num_threads)
    progress.phase("reading weights", None)
    model, kernels = load_best(folder, dtype)
    shape = model.shape
    num_row_tokens = min(_NUM_ROW_TOKENS, shape.max_model_len)
    memory = geometry(shape, _NUM_ROWS, num_row_tokens)
    backend = backend_of(model, memory)
    executor = SequentialExecutor(
        model,
        backend.attention,
        backend.cache,
        PersistentBatch(_NUM_ROWS, num_row_tokens, BLOCK_SIZE),
        rows=backend.rows,
    )
    stand = Stand(
        executor,
        num_rows=_NUM_ROWS,
        num_row_tokens=num_row_tokens,
        num_blocks=memory.num_blocks,
        copy=backend.cache.copy,
    )
    progress.phase("measuring steps", rounds)
    cells = measure(stand, (*FITTED, *HELD_OUT), rounds, progress.advance)
    what = What(
        model=folder.name,
        dtype=str(shape.dtype).removeprefix("torch."),
        kernels=kernels,
        num_threads=num_threads,
    )
    return profile_of(what, cells)


def table(profile: Profile) -> str:
    """Return the profile for people."""
    what, costs = profile.what, profile.costs
    lines = [
        f"{what.model}, {what.dtype}, kernels {what.kernels}, {what.num_threads} threads",
        "",
        f"{'step':<48}{'ms, median':>12}{'error':>8}",
    ]
    for cell in profile.cells:
        held_out = "" if cell.is_fitted else "  held out"
        lines.append(f"{cell.case!s:<48}{1000 * cell.median_s:>12.2f}{cell.error:>+8.1%}{held_out}")
    lines += [
        "",
        "dense layers: "
        + ", ".join(f"{num_tokens} in {1000 * s:.1f} ms" for num_tokens, s in costs.dense),
        f"and {1e3 * costs.request_s:.3f} ms a request, {1e6 * costs.context_token_s:.3f} us a key"
        f" read, {1e6 * costs.visit_s:.3f} us a key visited",
    ]
    return "\n".join(lines)
