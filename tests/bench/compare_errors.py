"""How often `hocket bench compare` is wrong: alarms between equals, slowdowns not found.

    python -m tests.bench.compare_errors [--num 50] [--slowdown 5] [--seed 0]

Comparisons of mock servers, as a user runs them: 12 pairs of runs, the interval of the primary
measure (median TTFT) at 95 %. Half are of a server with itself, half of it with another that is
some percent slower, in turn; chance says whether A or B is the slower one. Wrong are a difference
shown between equals (5 in 100 are expected), and a slower server for which none, or the wrong
direction, is shown.

Two processes with the same settings are not equal enough: where the machine is quiet, a comparison
shows that one is 0.1 % slower than the other, and it is.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.loadgen.mocks import LOADGEN, mock_server

TTFT_MS, ITL_MS = 50.0, 10.0
LOAD = "--num-sessions 16 --rate 40 --arrivals constant --prompt-tokens 16 --output-tokens 8"


def compare(a: str, b: str, seed: int, file: Path) -> dict[str, dict]:
    """Run one comparison; return what it showed of each measure, by name."""
    words = ["compare", a, b, "--pairs", "12", "--seed", str(seed), *LOAD.split()]
    done = subprocess.run(
        [*LOADGEN, *words, "--json", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return {it["name"]: it for it in json.loads(file.read_text())["comparisons"]}


def shown(comparison: dict) -> int:
    """Return 1 if B was shown to be slower, -1 if A was, 0 if no difference was shown."""
    low, high = comparison["interval"]
    return int(low > 1.0) - int(high < 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=50)
    parser.add_argument("--slowdown", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    factor = 1.0 + args.slowdown / 100.0
    speeds = [("--ttft-ms", TTFT_MS * times, "--itl-ms", ITL_MS * times) for times in (1, factor)]
    wrong, wrong_others, longest_s = {"equal": 0, "slower": 0}, 0, 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        mock_server(*speeds[0]) as (_, url),
        mock_server(*speeds[1]) as (_, slower),
    ):
        for number in range(2 * args.num):
            kind, other = (("equal", url), ("slower", slower))[number % 2]
            is_swapped = rng.random() < 0.5
            a, b = (other, url) if is_swapped else (url, other)
            start_s = time.monotonic()
            seed = args.seed + 1000 * number
            found = compare(a, b, seed, Path(folder) / "compare.json")
            longest_s = max(longest_s, time.monotonic() - start_s)
            right = 0 if kind == "equal" else (-1 if is_swapped else 1)
            primary = found.pop("ttft_p50")
            wrong[kind] += shown(primary) != right
            if kind == "equal":
                wrong_others += any(shown(it) for it in found.values() if it["interval"])
            low, high = primary["interval"]
            verdict = "" if shown(primary) == right else "  WRONG"
            print(
                f"{number + 1:>4} {kind:>6} seed {seed:>6} "
                f"{primary['ratio']:.3f} ({low:.3f} to {high:.3f}){verdict}",
                flush=True,
            )
    print(
        f"false alarms {wrong['equal']} of {args.num}; "
        f"slowdowns of {args.slowdown:g} % found {args.num - wrong['slower']} of {args.num}; "
        f"longest comparison {longest_s:.1f} s; of the equals, {wrong_others} showed a difference "
        "in one of the secondary measures, which share another 5 %"
    )


if __name__ == "__main__":
    main()
