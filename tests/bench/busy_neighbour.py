"""What a process that keeps half of one core busy does to the time of a step.

    python -m tests.bench.busy_neighbour [MODEL] [--batch 1 8 32] [--rounds 12] [--busy 0.5]

The neighbour computes for so much of every 10 ms, on one of the cores that the kernels' threads
use. Rounds with it and without it alternate, quiet, busy, busy, quiet, each of ten steps. Prints
medians and quartiles, and the median of the ratios of pairs of rounds; ends with 1 if that is above
2.2.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine import machine
from engine.backend import backend_of, load_best
from engine.bench.steps import Case, Stand, Steps, fill, geometry
from serving.progress import NoProgress
from serving.store.local import resolve

STEPS = 10
MOST = 2.2
NEIGHBOUR = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
period_s, busy_s = 0.01, 0.01 * float(sys.argv[2])
while True:
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < busy_s:
        pass
    time.sleep(max(0.0, began_s + period_s - time.perf_counter()))
"""


@contextmanager
def neighbour(core: int, busy: float) -> Iterator[int]:
    """A process that is stopped; yields its id."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(core), str(busy)])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def measure(steps: Steps, rounds: int, pid: int) -> tuple[list[float], list[float]]:
    """Return the medians of the rounds, quiet and busy, in pairs."""
    quiet: list[float] = []
    busy: list[float] = []
    for number in range(2 * rounds):
        is_busy = number % 4 in (1, 2)
        os.kill(pid, signal.SIGCONT if is_busy else signal.SIGSTOP)
        steps.step()
        (busy if is_busy else quiet).append(statistics.median(steps.step() for _ in range(STEPS)))
    os.kill(pid, signal.SIGSTOP)
    return quiet, busy


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--busy", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    num_threads = machine.num_usable_cores()
    torch.set_num_threads(num_threads)
    model, kernels = load_best(resolve(options.model, NoProgress()).path, options.dtype)
    num_rows, longest = max(options.batch), 256 + 2 * options.rounds * (STEPS + 1) + 2
    backend = backend_of(model, geometry(model.shape, num_rows, longest))
    fill(backend, options.seed)
    stand = Stand(model=model, backend=backend, num_rows=num_rows, max_model_len=longest)
    core = min(os.sched_getaffinity(0))
    print(
        f"kernels {kernels}, {num_threads} threads, core {core} {options.busy:.0%} busy, seed"
        f" {options.seed}; ms of a step, medians of {options.rounds} rounds (quartiles)"
    )
    worst = 0.0
    with neighbour(core, options.busy) as pid:
        for batch in options.batch:
            arms = measure(Steps(stand, Case(batch=batch, context=256)), options.rounds, pid)
            texts = []
            for name, arm in zip(("quiet", "busy"), arms, strict=True):
                low, median, high = (1000 * value for value in statistics.quantiles(arm, n=4))
                texts.append(f"{name} {median:7.2f} ({low:.2f} to {high:.2f})")
            ratio = statistics.median(busy / quiet for quiet, busy in zip(*arms, strict=True))
            worst = max(worst, ratio)
            print(f"batch {batch:3}  {'  '.join(texts)}  {ratio:.2f} x", flush=True)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
