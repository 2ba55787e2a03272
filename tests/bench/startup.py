"""Command to ready, by phase, for the real model (which must be in the cache) and for --fake.

    python -m tests.bench.startup

Each start is a fresh process; the arms alternate and medians are printed. `hocket --help` is timed
the same way. Measured on the CPU of the machine it runs on.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time

from tests.serving.servers import running_server

NUM_STARTS = 5
_PHASE = re.compile(r"([a-zA-Z-]+) ([0-9.]+)")
_STARTED = re.compile(r"Started in +([0-9.]+) s \((.*)\)")


def start(*args: str) -> dict[str, float]:
    begin_s = time.perf_counter()
    with running_server(*args) as server:
        wall_s = time.perf_counter() - begin_s
        found = _STARTED.search(server.block)
        assert found
        phases = {name: float(value) for name, value in _PHASE.findall(found[2])}
        return {"command to ready": wall_s, **phases}


def help_s() -> dict[str, float]:
    begin_s = time.perf_counter()
    command = [sys.executable, "-c", "from serving.cli import main; main()", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    return {"command to end": time.perf_counter() - begin_s}


def main() -> None:
    arms = {
        "hocket --help": help_s,
        "hocket serve --fake": lambda: start("--fake"),
        "hocket serve": start,
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for turn in range(NUM_STARTS):
        order = list(arms) if turn % 2 == 0 else list(reversed(arms))
        for name in order:
            seconds[name].append(arms[name]())
    print(f"seconds, median of {NUM_STARTS} starts (min to max)")
    for name, starts in seconds.items():
        print(name)
        for phase in starts[0]:
            values = [start[phase] for start in starts]
            median = statistics.median(values)
            print(f"  {phase:<18} {median:6.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
