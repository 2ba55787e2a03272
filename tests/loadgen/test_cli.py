"""The verbs as a user meets them: whole programs, on free ports of loopback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from cyclopts import CoercionError

from loadgen.cli import app
from loadgen.report.files import read_json
from tests.loadgen.mocks import LOADGEN, mock_server


def loadgen(*words, expect=0):
    """Run to the end; return what was printed to stdout and stderr."""
    done = subprocess.run([*LOADGEN, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def wait_until_busy(url: str, num_requests: int) -> None:
    """Wait until the mock server has got so many requests."""
    for _ in range(3000):
        with urllib.request.urlopen(f"{url}/health") as answer:
            if json.load(answer)["num_requests"] >= num_requests:
                return
        time.sleep(0.02)
    raise AssertionError("no requests came")


def test_a_run_is_printed_written_and_replayed(tmp_path: Path):
    files = {name: tmp_path / name for name in ("run.json", "run.html", "plan.jsonl")}
    with mock_server("--ttft-ms", 10, "--itl-ms", 1) as (_, url):
        load = ("--num-sessions", 30, "--rate", 50, "--output-tokens", 5, "--slo", "ttft:5000")
        to = ("--json", files["run.json"], "--html", files["run.html"])
        out, _ = loadgen("run", url, *load, *to, "--record", files["plan.jsonl"])
        assert "30 of 30 requests answered" in out
        assert "goodput" in out
        again = tmp_path / "again.json"
        loadgen("run", url, "--trace", files["plan.jsonl"], "--json", again)
    first, second = read_json(files["run.json"]), read_json(again)
    assert [record.num_output_tokens for record in first.records] == [5] * 30
    assert [record.intended_at_s for record in first.records] == [
        record.intended_at_s for record in second.records
    ]
    assert "<svg" in files["run.html"].read_text()


def test_ctrl_c_still_writes_the_report(tmp_path: Path):
    file = tmp_path / "run.json"
    with mock_server("--ttft-ms", 10) as (_, url):
        load = ("--num-sessions", "1000", "--rate", "20", "--output-tokens", "2")
        words = ("run", url, *load, "--json", str(file))
        with subprocess.Popen([*LOADGEN, *words], stdout=subprocess.PIPE, text=True) as process:
            wait_until_busy(url, 10)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 130
    run = read_json(file)
    assert run.interrupted
    assert run.num_unsent == 1000 - len(run.records) > 0
    assert "interrupted" in out.lower()


def test_a_server_that_dies_is_told_and_what_came_before_is_kept(tmp_path: Path):
    file = tmp_path / "run.json"
    with mock_server("--ttft-ms", 5, "--itl-ms", 1) as (server, url):
        load = ("--num-sessions", "80", "--rate", "20", "--output-tokens", "2")
        words = ("run", url, *load, "--json", str(file))
        with subprocess.Popen([*LOADGEN, *words], stdout=subprocess.PIPE, text=True) as process:
            wait_until_busy(url, 10)
            server.kill()
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    run = read_json(file)
    errors = {record.error for record in run.records}
    assert "" in errors
    assert "refused" in errors
    assert len(run.records) == 80
    assert re.search(r"refused", out)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["run", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["run", "localhost"], "'localhost' is no address"),
        (["run", "URL", "--trace", "nowhere.csv"], "nowhere.csv"),
        (["run", "URL", "--trace", __file__], "test_cli.py"),
        (["run", "URL", "--num-sessions", "0"], "no request"),
        (["run", "URL", "--concurrency", "0"], "concurrency"),
        (["run", "URL", "--slo", "ttft"], "not an objective"),
        (["run", "URL", "--extra", "3"], "no JSON object"),
        (["run", "URL", "--prompt-tokens", "many"], "many"),
        (["run", "ERRORS"], "all 100 requests failed, the first with http_503"),
        (["run", "URL", "--timeout", "nan"], "a timeout of nan s"),
        (["compare", "URL", "URL", "--pairs", "3"], "3 pairs of runs"),
        (["compare", "", "", "--serve", "true"], "does not say where its port goes"),
        (["compare", "", "", "--serve", "false {port}"], "did not get ready"),
        (["compare", "", "", "--serve", "no-such-program {port}"], "cannot be started"),
    ],
)
def test_a_mistake_is_a_line_of_cause_and_one_of_remedy(words, cause, servers):
    words = [servers.get(word, word) for word in words]
    quick = () if "--num-sessions" in words else ("--rate", "1000")
    _, err = loadgen(*words, *quick, expect=1)
    lines = [line for line in err.splitlines() if line.startswith(("hocket: ", "        "))]
    assert cause in lines[0]
    assert len(lines) >= 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--seed", "1.5"],
        ["run", "--num-sessions", "2.5"],
        ["run", "--cache-tokens", "1e3"],
        ["mock", "--error-status", "500.5"],
    ],
)
def test_a_whole_number_is_not_rounded(words):
    with pytest.raises(CoercionError, match=f"'{words[-1]}' is not a whole number"):
        app.parse_args(words, exit_on_error=False, print_error=False)
    app.parse_args([*words[:-1], "500"], exit_on_error=False, print_error=False)


@pytest.fixture(scope="module")
def servers():
    with (
        mock_server("--ttft-ms", 1) as (_, url),
        mock_server("--error-rate", 1, "--error-status", 503) as (_, bad),
    ):
        yield {"URL": url, "ERRORS": bad}


def test_a_comparison_starts_and_stops_its_servers(tmp_path: Path):
    serve = f"{sys.executable} -m loadgen mock --port {{port}} --itl-ms 1 --ttft-ms"
    load = ("--pairs", 2, "--num-sessions", 10, "--rate", 100, "--output-tokens", 3)
    file = tmp_path / "run.json"
    out, _ = loadgen("compare", "20", "60", "--serve", serve, *load, "--json", file)
    row = next(line for line in out.splitlines() if line.startswith("ttft_p50 (primary)"))
    assert "6" in row, "too few pairs for a verdict, and how many are needed"
    shown = json.loads(file.read_text())
    primary = shown["comparisons"][0]
    assert (primary["name"], primary["primary"], primary["num_pairs"]) == ("ttft_p50", True, 2)
    assert 2 < primary["ratio"] < 4, "60 ms against 20"
    assert shown["arms"] == {"A": "20", "B": "60"}
    runs = {path.stem: read_json(path) for path in tmp_path.glob("run-*.json")}
    assert {stem: (run.name, run.seed) for stem, run in runs.items()} == {
        "run-0A": ("A: 20", 0),
        "run-0B": ("B: 60", 0),
        "run-1A": ("A: 20", 1),
        "run-1B": ("B: 60", 1),
    }
    starts = [run.start_unix_s for _, run in sorted(runs.items())]
    assert starts[0] < starts[1] < starts[3] < starts[2] or starts[1] < starts[0] < starts[2]
