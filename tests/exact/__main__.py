"""The exactness proof: SmolLM2-135M-Instruct against transformers. Run `python -m tests.exact`.

Prints one line for each check and exits with 1 if any fails. It takes minutes, and says on stderr
where it is.

Forced: every request is dictated transformers' own fp32 greedy tokens, so each position is compared
under the same history. Free: every request goes on with what it sampled itself.

Shape legend: N requests, P forced positions of each, V vocabulary.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from engine import machine
from engine.backend import load_best
from serving.progress import TerminalProgress
from serving.store.local import resolve
from tests.exact.measure import (
    BF16_MEAN_FACTOR,
    BF16_P999_FACTOR,
    FP32_LIMIT,
    GREEDY_DIFFERENCES,
    GREEDY_GAP,
    Errors,
    bf16_excess,
    logit_errors,
    logprob_errors,
    partings,
)
from tests.exact.reference import ATTENTION, Reference, prose
from tests.exact.teacher import Played, Script, Stage, play, teach

# 3 to 3,000 tokens, about as many of each magnitude, and the edges of blocks, budgets and pieces.
LENGTHS = (
    (3, 4, 6, 9, 13, 16, 17, 33, 48, 64, 65, 96)
    + (140, 200, 256, 300, 420, 512, 640, 900, 1300, 1800, 2400, 3000)
)  # fmt: skip
NUM_FORCED = 48
# Which texts, and in which order they arrive; this order needs preemption in three of the stages.
DEFAULT_SEED = 6
# The longest request needs 191 blocks, all 24 together 844: from hardly any room to room for all.
FORCED = (
    Stage(budget=64, max_num_running=24, num_blocks=200),
    Stage(budget=512, max_num_running=24, num_blocks=420),
    Stage(budget=4096, max_num_running=24, num_blocks=900),
)
# Alone, in small company, in larger company, and coming and going.
FREE = (
    Stage(budget=512, max_num_running=1, num_blocks=200),
    Stage(budget=512, max_num_running=4, num_blocks=260),
    Stage(budget=512, max_num_running=16, num_blocks=900),
    Stage(budget=512, max_num_running=16, num_blocks=300, steps_between_arrivals=6),
)
HEADINGS = (
    ("check", "dtype", "budget", "blocks", "running", "steps", "mixed", "preempted")
    + ("mean", "p99.9", "max", "verdict")
)  # fmt: skip
WIDTHS = (28, 9, 6, 6, 7, 5, 5, 9, 9, 9, 9, 0)


@dataclass(frozen=True)
class Right:
    """What transformers says, computed once."""

    scripts: list[Script]
    fp32_NPV: Tensor
    fp32_steps: Errors  # its own two ways against each other, of logits
    bf16_whole: Errors  # of log-probabilities, as below
    bf16_steps: Errors


class Report:
    """Prints the table as it grows, and remembers whether all went well."""

    def __init__(self) -> None:
        self.failed = False
        self._line(HEADINGS)

    def line(
        self,
        check: str,
        dtype: str,
        stage: Stage | None,
        played: Played | None,
        errors: Errors | None,
        verdict: tuple[bool, str] | None = None,
    ) -> None:
        cells = [check, dtype]
        cells += [str(stage.budget), str(stage.num_blocks)] if stage else [""] * 2
        if played is None:
            cells += [""] * 4
        else:
            cells += [f"<={played.max_num_running}", str(played.num_steps)]
            cells += [str(played.num_mixed_steps), str(played.num_preemptions)]
        cells += [f"{number:.2e}" for number in errors] if errors else [""] * 3
        if verdict is not None:
            passed, why = verdict
            self.failed |= not passed
            cells.append(f"{'PASS' if passed else 'FAIL'}  {why}")
        self._line(cells)

    def _line(self, cells: Sequence[str]) -> None:
        first, *others = zip(cells, WIDTHS, strict=False)
        line = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print(" ".join(line).rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exact", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="which texts, in which order"
    )
    seed: int = parser.parse_args().seed
    torch.set_num_threads(machine.num_usable_cores())
    with TerminalProgress() as progress:
        folder = resolve(None, progress).path
    print(
        f"{folder.name}: {len(LENGTHS)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens (seed"
        f" {seed}), {NUM_FORCED} positions each\n"
        f"transformers {transformers.__version__} ({ATTENTION}), torch {torch.__version__},"
        f" {torch.get_num_threads()} threads, {platform.machine()}"
        f" {torch.backends.cpu.get_cpu_capability()}\n"
        "mean, p99.9, max: fp32, of |logit error| / largest |logit| of the row;"
        " bf16, of |log-probability error| against fp32\n"
    )
    right = ask_transformers(folder, seed)
    report = Report()
    theirs = "transformers, step by step"
    report.line(theirs, "float32", None, None, right.fp32_steps)
    check_fp32(report, folder, right)
    report.line(theirs, "bfloat16", None, None, right.bf16_steps)
    report.line("transformers, whole (= x1)", "bfloat16", None, None, right.bf16_whole)
    check_bf16(report, folder, right)
    seconds = time.monotonic() - START_S
    print(f"\n{'FAIL' if report.failed else 'PASS'} after {seconds:.0f} s")
    return int(report.failed)


def ask_transformers(folder: Path, seed: int) -> Right:
    say("transformers float32: greedy tokens")
    reference = Reference(folder, torch.float32)
    lengths = list(LENGTHS)
    random.Random(seed).shuffle(lengths)
    prompts = prose(folder, lengths, seed)
    greedy = [reference.greedy(prompt, NUM_FORCED) for prompt in prompts]
    scripts = [Script(prompt, said) for prompt, (said, _) in zip(prompts, greedy, strict=True)]
    say("transformers float32: whole sequences")
    fp32_NPV = torch.stack([reference.whole(script) for script in scripts])
    fp32_steps = logit_errors(torch.stack([logits_PV for _, logits_PV in greedy]), fp32_NPV)
    say("transformers bfloat16: whole sequences")
    reference = Reference(folder, torch.bfloat16)
    logits_NPV = torch.stack([reference.whole(script) for script in scripts])
    bf16_whole = logprob_errors(logits_NPV, fp32_NPV)
    say("transformers bfloat16: step by step")
    logits_NPV = torch.stack([reference.stepwise(script) for script in scripts])
    return Right(scripts, fp32_NPV, fp32_steps, bf16_whole, logprob_errors(logits_NPV, fp32_NPV))


def check_fp32(report: Report, folder: Path, right: Right) -> None:
    model, kernels = load_best(folder, "float32")
    say(f"float32: kernels {kernels}")
    for stage in FORCED:
        say(f"float32: forced, budget {stage.budget}")
        logits_NPV, played = teach(model, right.scripts, stage)
        errors = logit_errors(logits_NPV, right.fp32_NPV)
        verdict = errors.max <= FP32_LIMIT, f"max <= {FP32_LIMIT:.0e}"
        report.line("forced", "float32", stage, played, errors, verdict)
    prompts = [script.prompt for script in right.scripts]
    for stage in FREE:
        gap = stage.steps_between_arrivals
        say(f"float32: free, at most {stage.max_num_running} running")
        played = play(model, prompts, NUM_FORCED, stage)
        texts = [script.forced for script in right.scripts]
        found = partings(played.tokens, texts, right.fp32_NPV)
        passed = len(found) <= GREEDY_DIFFERENCES and all(p.gap < GREEDY_GAP for p in found)
        why = f"{len(found)} of {len(prompts)} texts differ"
        why += "".join(f"; request {p.request} at {p.at}, gap {p.gap:.1e}" for p in found)
        check = f"free, arrivals every {gap} steps" if gap else "free, all at once"
        report.line(check, "float32", stage, played, None, (passed, why))


def check_bf16(report: Report, folder: Path, right: Right) -> None:
    model, kernels = load_best(folder, "bfloat16")
    say(f"bfloat16: kernels {kernels}")
    for stage in FORCED:
        say(f"bfloat16: forced, budget {stage.budget}")
        logits_NPV, played = teach(model, right.scripts, stage)
        errors = logprob_errors(logits_NPV, right.fp32_NPV)
        mean, p999 = bf16_excess(errors, right.bf16_whole)
        verdict = (
            mean <= BF16_MEAN_FACTOR and p999 <= BF16_P999_FACTOR,
            f"x{mean:.3f} <= x{BF16_MEAN_FACTOR}, x{p999:.3f} <= x{BF16_P999_FACTOR}",
        )
        report.line("forced", "bfloat16", stage, played, errors, verdict)


def say(what: str) -> None:
    print(f"[{time.monotonic() - START_S:6.1f} s] {what}", file=sys.stderr, flush=True)


START_S = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
