"""`compare` as a user meets it: servers started and stopped, and what is left when one fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from loadgen.report.files import read_json
from tests.loadgen.mocks import LOADGEN, mock_server

LOAD = ("--num-sessions", 10, "--rate", 100, "--output-tokens", 3, "--prompt-tokens", 8)


def compare(*words, expect=0):
    words = [*LOADGEN, "compare", *map(str, words), *map(str, LOAD)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def primary_row(out: str) -> str:
    return next(line for line in out.splitlines() if "(primary)" in line)


def test_a_comparison_starts_and_stops_its_servers(tmp_path: Path):
    serve = f"{sys.executable} -m loadgen mock --port {{port}} --itl-ms 1"
    file = tmp_path / "run.json"
    a, b = "--ttft-ms 20", "--ttft-ms 60"
    out, _ = compare(a, b, "--serve", serve, "--pairs", 2, "--json", file)
    assert "6" in primary_row(out), "too few pairs for a verdict, and how many are needed"
    shown = json.loads(file.read_text())
    primary = shown["comparisons"][0]
    assert (primary["name"], primary["primary"], primary["num_pairs"]) == ("ttft_p50", True, 2)
    assert 2 < primary["ratio"] < 4, "60 ms against 20"
    assert {name: arm["name"] for name, arm in shown["arms"].items()} == {"A": a, "B": b}
    assert shown["arms"]["B"]["num_requests"] == 20
    runs = {path.stem: read_json(path) for path in tmp_path.glob("run-*.json")}
    assert {stem: (run.name, run.seed) for stem, run in runs.items()} == {
        "run-0A": (f"A: {a}", 0),
        "run-0B": (f"B: {b}", 0),
        "run-1A": (f"A: {a}", 1),
        "run-1B": (f"B: {b}", 1),
    }
    starts = [run.start_unix_s for _, run in sorted(runs.items())]
    assert starts[0] < starts[1] < starts[3] < starts[2] or starts[1] < starts[0] < starts[2]


def test_an_arm_that_fails_its_requests_is_not_the_quicker_one(tmp_path: Path):
    failing = ("--ttft-ms", 1, "--error-rate", 0.5, "--error-status", 503)
    file = tmp_path / "compare.json"
    with mock_server("--ttft-ms", 5) as (_, good), mock_server(*failing) as (_, bad):
        out, _ = compare(good, bad, "--pairs", 6, "--json", file)
    assert "not comparable: B failed" in primary_row(out)
    assert "of 60 requests failed." in out
    found = {it["name"]: it for it in json.loads(file.read_text())["comparisons"]}
    assert found["itl_p50"]["ratio"] is None
    assert found["output_tokens_per_s"]["ratio"] < 0.9, "what failed brought no tokens"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_whole_pairs_showed_outlives_an_interruption(tmp_path: Path, number):
    """The interruption comes in the first run of the second pair, which then counts for nothing."""
    file = tmp_path / "compare.json"
    with mock_server("--ttft-ms", 30) as (_, url):
        words = ["compare", url, url, "--pairs", "6", "--json", str(file), *map(str, LOAD)]
        with subprocess.Popen([*LOADGEN, *words], stdout=subprocess.PIPE, text=True) as process:
            while True:
                with urllib.request.urlopen(f"{url}/health") as answer:
                    if json.load(answer)["num_requests"] > 21:
                        break
                time.sleep(0.005)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    shown = json.loads(file.read_text())["comparisons"][0]
    assert shown["num_pairs"] == int(primary_row(out).split("no verdict: ")[1].split()[0])
    runs = [read_json(path) for path in tmp_path.glob("compare-*.json")]
    assert len(runs) == 2 * shown["num_pairs"] > 0
    assert not any(run.interrupted for run in runs)


def test_a_server_that_does_not_start_again_costs_no_pair_before_it(tmp_path: Path):
    """The third start fails: its cause is told, after what the first pair showed."""
    program, file = tmp_path / "flaky.py", tmp_path / "compare.json"
    program.write_text(
        "import os, pathlib, sys\n"
        "count = pathlib.Path(__file__).with_suffix('.count')\n"
        "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "if len(count.read_text()) == 3: sys.exit('out of memory')\n"
        "words = [sys.executable, '-m', 'loadgen', 'mock', '--port', sys.argv[1]]\n"
        "os.execv(sys.executable, words)\n"
    )
    serve = f"{sys.executable} {program} {{port}}"
    out, err = compare("", "", "--serve", serve, "--pairs", 2, "--json", file, expect=1)
    assert "1 pairs of runs" in primary_row(out)
    assert json.loads(file.read_text())["comparisons"][0]["num_pairs"] == 1
    assert "did not get ready" in err
    assert "out of memory" in err
