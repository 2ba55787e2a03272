"""The verbs as a user meets them: whole programs, on free ports of loopback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
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
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)  # an impatient one
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
        with subprocess.Popen(
            [*LOADGEN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until_busy(url, 10)
            server.kill()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 1
    assert re.search(r"hocket: the server went away: .* of 80 requests failed\n +see its log", err)
    run = read_json(file)
    errors = {record.error for record in run.records}
    assert "" in errors
    assert "refused" in errors
    assert len(run.records) == 80
    assert re.search(r"refused", out)


def test_results_are_written_though_nobody_reads_what_is_printed(tmp_path: Path):
    file = tmp_path / "run.json"
    with mock_server("--ttft-ms", 1) as (_, url):
        words = ("run", url, "--num-sessions", "3", "--rate", "100", "--json", str(file))
        with subprocess.Popen([*LOADGEN, *words], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(timeout=60) == 0
    assert len(read_json(file).records) == 3


def test_tenants_have_the_weights_that_they_were_given(tmp_path: Path):
    file = tmp_path / "run.json"
    with mock_server("--ttft-ms", 1) as (_, url):
        load = ("--num-sessions", 20, "--rate", 200, "--tenants", "gold:3", "--tenants", "free:1")
        loadgen("run", url, *load, "--json", file)
    tenants = json.loads(file.read_text())["summary"]["fairness"]["tenants"]
    assert {it["name"]: it["weight"] for it in tenants} == {"gold": 3.0, "free": 1.0}


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
        (["run", "URL", "--json", "/"], "'/' is not the name of a file"),
        (["run", "URL", "--html", "nowhere/x.html"], "there is no folder nowhere"),
        (["run", "URL", "--html", "x", "--json", "./x"], "x is named twice"),
        (["compare", "URL", "URL", "--primary", "ttft_p5O"], "there is no measure ttft_p5O"),
        (["compare", "URL", "URL", "--primary", "goodput"], "goodput needs objectives"),
        (
            ["compare", "URL", "URL", "--primary", "ttft_p99"],
            "100 requests has no ttft_p99",
        ),
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
