"""A real Prometheus watches a server under load; every query of every panel must answer, truly.

    python -m tests.system.prometheus [--duration-s 45]

It installs nothing. Exits with 1 if a query is empty or not finite, if promtool finds fault with
the page or the rules, or if a panel differs by more than 5 % from what the load generator knows of
it. A quantile may differ by more, if the client's is in the same bucket or there are too few
samples to know it; and a mean TTFT or E2E be 3 ms shorter than the client's, who is not in the
server.

Three loads: one of long requests, one of many short ones, of which the HTTP part is a good part of
the TTFT, and a burst that is refused in part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from loadgen.report.files import read_json
from loadgen.servers import free_port, running
from loadgen.types import Run
from serving.telemetry.table import BY_NAME
from tests.system.client_view import Known, Quantile, Total, Value, counts, everything

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy/dashboards"
TOLERANCE = 0.05
RATE_INTERVAL_S = 15
SCRAPE_S = 1
NO_LABELS: Mapping[str, str] = {}
HOCKET = [sys.executable, "-c", "from serving.cli import main; main()"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--duration-s", type=float, default=45)
    duration_s = parser.parse_args().duration_s
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        print(
            f"not found: {', '.join(missing)}\n"
            "  Debian and Ubuntu: apt-get install prometheus (it has promtool too)",
            file=sys.stderr,
        )
        return 1
    problems = check_rules()
    problems += asyncio.run(watch(duration_s))
    for problem in problems:
        print(f"FAILED  {problem}")
    print("PASSED" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def promtool(*args: str, page: bytes | None = None) -> list[str]:
    done = subprocess.run(["promtool", *args], input=page, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode().strip()
    clean = done.returncode == 0
    print(f"promtool {' '.join(args[:2])}: {'clean' if clean else 'not clean'}")
    return [] if clean else [f"promtool {' '.join(args)}: {said}"]


def check_rules() -> list[str]:
    return [
        *promtool("check", "config", str(DASHBOARDS / "prometheus.yml")),
        *promtool("check", "rules", str(DASHBOARDS / "alerts.yml")),
        *promtool("test", "rules", str(DASHBOARDS / "alerts.test.yml")),
    ]


LOADS = {
    "a request every half second": (
        "--rate 2 --prompt-tokens 256 --output-tokens 64 --num-prefixes 2 --prefix-tokens 64"
    ),
    "short requests, 8 a second": "--rate 8 --prompt-tokens 16 --output-tokens 16",
}
BURST = "--rate 100 --prompt-tokens 256 --output-tokens 64"  # most of it is refused
BURST_S = 5


async def watch(duration_s: float) -> list[str]:
    serve = [*HOCKET, "serve", "--fake", "--port", "{port}", "--max-num-streams", "24"]
    server, stop = " ".join(map(_shell, serve)), asyncio.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The second server is idle, and has an instance-0 too: it must change nothing.
        async with running(server, stop) as url, running(server, stop) as idle:
            with prometheus(folder, [url, idle]) as source:
                problems = await check_servers(source)
                for name, words in LOADS.items():
                    run = await load(url, folder, words, duration_s)
                    problems += compare(source, url, run, name, everything(run))
                    if words == LOADS["a request every half second"]:
                        begin_s, end_s = run.start_unix_s, run.start_unix_s + run.duration_s
                        problems += check_panels(source, begin_s + RATE_INTERVAL_S, end_s)
                burst = await load(url, folder, BURST, BURST_S)
                problems += compare(source, url, burst, "a burst, refused in part", counts(burst))
                if all(record.ok for record in burst.records):
                    problems.append("nothing was refused")
                return promtool("check", "metrics", page=get(f"{url}/metrics")) + problems


async def load(url: str, folder: Path, words: str, duration_s: float) -> Run:
    """Send a load, and wait until nothing of it is left to be scraped."""
    result = folder / "load.json"
    await asyncio.to_thread(send_load, url, result, words, duration_s)
    await asyncio.sleep(3 * SCRAPE_S)
    return read_json(result)


def _shell(word: str) -> str:
    return f"'{word}'" if " " in word else word


@contextlib.contextmanager
def prometheus(folder: Path, urls: list[str]):
    """Run a Prometheus that scrapes the servers every second; yields its address."""
    config, port = folder / "prometheus.yml", free_port()
    targets = ", ".join(f'"{server_of(url)}"' for url in urls)
    text = (DASHBOARDS / "prometheus.yml").read_text()
    assert "scrape_interval: 15s" in text
    assert '"127.0.0.1:8000"' in text
    text = text.replace("scrape_interval: 15s", f"scrape_interval: {SCRAPE_S}s")
    text = text.replace('"127.0.0.1:8000"', targets)
    config.write_text(text.replace("alerts.yml", str(DASHBOARDS / "alerts.yml")))
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def server_of(url: str) -> str:
    """Return the value of the label `server`."""
    return urllib.parse.urlsplit(url).netloc


def send_load(url: str, result: Path, words: str, duration_s: float) -> None:
    command = (
        f"bench run {url} --duration-s {duration_s} --arrivals constant --tokenizer bytes"
        f" --json {result} {words}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # It fails when a request does, as those of the burst do; no result is noticed anyway.
    subprocess.run([*HOCKET, *command.split()], check=False, cwd=ROOT, env=env)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        page: bytes = answer.read()
        return page


def ask(source: str, path: str, **parameters: object) -> list[dict]:
    answer = json.loads(get(f"{source}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
    assert answer["status"] == "success", answer
    found: list[dict] = answer["data"]["result"]
    return found


def panels():
    """Yield (dashboard, panel, legend, expression) of each query."""
    for name in ("overview", "engine"):
        for panel in json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield name, panel["title"], target["legendFormat"], target["expr"]


def substituted(expr: str, window: str) -> str:
    expr = expr.replace("$__rate_interval", window).replace("$model", ".*")
    assert "$" not in expr, expr
    return expr


async def check_servers(source: str) -> list[str]:
    """Wait for the first scrapes: two servers with an instance-0 each are two instances."""
    query, seen = "count(hocket_instance_up)", "none"
    for _ in range(20):
        await asyncio.sleep(SCRAPE_S)
        with contextlib.suppress(OSError):  # it starts
            for series in ask(source, "query", query=query):
                seen = series["value"][1]
        if seen == "2":
            return []
    return [f"of 2 instances {seen} are told apart"]


def check_panels(source: str, start_s: float, end_s: float) -> list[str]:
    problems, num_queries, num_values = [], 0, 0
    for board, title, legend, expr in panels():
        query = substituted(expr, f"{RATE_INTERVAL_S}s")
        found = ask(source, "query_range", query=query, start=start_s, end=end_s, step=1)
        values = [float(value) for series in found for _, value in series["values"]]
        num_queries += 1
        num_values += len(values)
        where = f"{board} / {title} / {legend}"
        if not values:
            problems.append(f"{where}: empty: {query}")
        elif not all(map(math.isfinite, values)):
            num_bad = sum(not math.isfinite(value) for value in values)
            problems.append(f"{where}: {num_bad} of {len(values)} values not finite: {query}")
    print(f"{num_queries} queries of panels, {num_values} values, {len(problems)} problems")
    return problems


def compare(source: str, url: str, run: Run, name: str, known: Iterable[Known]) -> list[str]:
    """Compare what panels say of the whole run with what the client saw of it."""
    window = Window.around(source, url, run)
    queries = {(title, legend): expr for _, title, legend, expr in panels()}
    problems = []
    print(f"\n{name}: {len(run.records)} requests, a window of {window.num_s} s")
    print(f"{'panel':56} {'Prometheus':>10} {'client':>10} {'off by':>8}")
    for item in known:
        labels = item.labels if isinstance(item, Total) else {}
        shown = " ".join([f"{item.title}, {item.legend}", *labels.values()])
        expr = queries.get((item.title, item.legend))
        if expr is None:
            problems.append(f"no such panel: {shown}")
            continue
        value = window.ask(source, expr, labels)
        client = item.count / window.num_s if isinstance(item, Total) else item.value
        off = value / client - 1 if client else (0.0 if value == 0 else math.inf)
        true, why = abs(off) <= TOLERANCE, ""
        if not true and isinstance(item, Quantile):
            true, why = _in_bucket(item, value)
            if not item.is_known:
                true, why = True, f"{why}, too few samples to judge it"
        elif not true and isinstance(item, Value) and 0 <= client - value <= item.slack:
            true, why = True, f"{1000 * (client - value):.1f} ms on the way"
        print(f"{shown:56} {value:10.4f} {client:10.4f} {off:8.1%}  {why}")
        if not true:
            problems.append(f"{name} / {shown}: {value:g}, the client saw {client:g}")
    return problems


def _in_bucket(item: Quantile, value: float) -> tuple[bool, str]:
    """Whether the client's quantile, give or take the tolerance, is in the bucket of this value.

    That is all that buckets tell; where in it the panel puts the quantile is a guess.
    """
    bounds = (0.0, *BY_NAME[item.metric].buckets, math.inf)
    low, high = next((low, high) for low, high in pairwise(bounds) if low < value <= high)
    true = item.value * (1 + TOLERANCE) > low and item.value * (1 - TOLERANCE) <= high
    return true, f"{'in' if true else 'not in'} the bucket {low:g} to {high:g}"


@dataclass(frozen=True)
class Window:
    """From one scrape before a run to one after it, with both: what Prometheus sees is then all
    of it, and it extrapolates nothing.
    """

    end_s: float  # Unix time of a scrape
    num_s: int

    @classmethod
    def around(cls, source: str, url: str, run: Run) -> Window:
        up = f'up{{server="{server_of(url)}"}}'
        (found,) = ask(source, "query", query=f"timestamp({up})")
        end_s = float(found["value"][1])
        assert end_s > run.start_unix_s + run.duration_s, "it was not scraped since"
        window = cls(end_s, math.ceil(end_s - run.start_unix_s) + 1)
        scrapes = window.ask(source, f"count_over_time({up}[$__rate_interval])")
        if scrapes != window.num_s / SCRAPE_S + 1:
            print(f"{scrapes:g} scrapes in {window.num_s} s: rates are a little off")
        return window

    def ask(self, source: str, expr: str, labels: Mapping[str, str] = NO_LABELS) -> float:
        """Return the value of the series with these labels at the end, several added up."""
        # A little longer than it is, so that rounded times leave no scrape out.
        query = substituted(expr, f"{1000 * self.num_s + 50}ms")
        found = ask(source, "query", query=query, time=f"{self.end_s:.3f}")
        return sum(
            float(series["value"][1])
            for series in found
            if labels.items() <= series["metric"].items()
        )


if __name__ == "__main__":
    sys.exit(main())
