"""A real Prometheus watches a server under load; every query of every panel must answer, truly.

    python -m tests.system.prometheus [--duration-s 60]

It installs nothing. Exits with 1 if a query is empty or not finite, if promtool finds fault with
the page or the rules, or if throughput, TTFT or ITL differ from the load generator's own numbers by
more than 5 %.
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
import time
import urllib.parse
import urllib.request
from pathlib import Path

from loadgen.metrics import summarize
from loadgen.report.files import read_json
from loadgen.servers import free_port, running

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy/dashboards"
TOLERANCE = 0.05
RATE_INTERVAL_S = 15
HOCKET = [sys.executable, "-c", "from serving.cli import main; main()"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--duration-s", type=float, default=60)
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


async def watch(duration_s: float) -> list[str]:
    server = " ".join(map(_shell, [*HOCKET, "serve", "--fake", "--port", "{port}"]))
    with tempfile.TemporaryDirectory() as folder:
        async with running(server, asyncio.Event()) as url:
            with prometheus(Path(folder), url) as source:
                await asyncio.sleep(3)
                result = Path(folder) / "load.json"
                start_s = time.time()  # noqa: TID251 (Prometheus's clock)
                await asyncio.to_thread(send_load, url, result, duration_s)
                end_s = time.time()  # noqa: TID251
                await asyncio.sleep(2.5)  # two scrapes more
                page = get(f"{url}/metrics")
                return [
                    *promtool("check", "metrics", page=page),
                    *check_panels(source, start_s + RATE_INTERVAL_S, end_s),
                    *compare(source, read_json(result)),
                ]


def _shell(word: str) -> str:
    return f"'{word}'" if " " in word else word


@contextlib.contextmanager
def prometheus(folder: Path, url: str):
    """Run a Prometheus that scrapes the server every second; yields its address."""
    config, port = folder / "prometheus.yml", free_port()
    target = urllib.parse.urlsplit(url).netloc
    text = (DASHBOARDS / "prometheus.yml").read_text()
    assert "scrape_interval: 15s" in text
    assert "127.0.0.1:8000" in text
    text = text.replace("scrape_interval: 15s", "scrape_interval: 1s")
    text = text.replace("127.0.0.1:8000", target)
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


def send_load(url: str, result: Path, duration_s: float) -> None:
    words = (
        f"bench run {url} --duration-s {duration_s} --arrivals constant --rate 2 --tokenizer bytes"
        f" --prompt-tokens 256 --output-tokens 64 --num-prefixes 2 --prefix-tokens 64"
        f" --json {result}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*HOCKET, *words.split()], check=True, cwd=ROOT, env=env)


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


def substituted(expr: str, window_s: float) -> str:
    expr = expr.replace("$__rate_interval", f"{window_s:.0f}s").replace("$model", ".*")
    assert "$" not in expr, expr
    return expr


def check_panels(source: str, start_s: float, end_s: float) -> list[str]:
    problems, num_queries, num_values = [], 0, 0
    for board, title, legend, expr in panels():
        query = substituted(expr, RATE_INTERVAL_S)
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


def compare(source: str, run) -> list[str]:
    """Compare what panels say of the whole run with what the client saw of it."""
    summary = summarize(run)
    throughput = summary.throughput
    window_s = math.ceil(run.duration_s)
    expected = {
        ("Tokens", "prompt tokens/s"): throughput.input_tokens_per_s,
        ("Tokens", "generated tokens/s"): throughput.output_tokens_per_s,
        ("Time to first token", "mean"): summary.ttft.mean_s,
        ("Inter-token latency", "mean"): summary.itl.mean_s,
        ("Time per output token", "mean"): summary.tpot.mean_s,
        ("End to end", "mean"): summary.e2e.mean_s,
    }
    quantiles = {
        ("Time to first token", "p50"): summary.ttft.p50_s,
        ("Inter-token latency", "p50"): summary.itl.p50_s,
        ("End to end", "p50"): summary.e2e.p50_s,
    }
    end_s = run.start_unix_s + run.duration_s + 1
    problems = []
    print(f"{'panel':42} {'Prometheus':>10} {'client':>10} {'off by':>8}")
    for board, title, legend, expr in panels():
        client = (expected | quantiles).get((title, legend))
        if client is None:
            continue
        (found,) = ask(source, "query", query=substituted(expr, window_s), time=end_s)
        value = float(found["value"][1])
        off = value / client - 1
        # A quantile of a histogram is a guess inside a bucket; it is shown, and not judged.
        judged = (title, legend) in expected
        print(
            f"{title + ', ' + legend:42} {value:10.4f} {client:10.4f} {off:8.1%}"
            f"{'' if judged else '  (inside a bucket)'}"
        )
        if judged and abs(off) > TOLERANCE:
            problems.append(f"{board} / {title} / {legend}: {value:g}, the client saw {client:g}")
    missing = set(expected) - {(title, legend) for _, title, legend, _ in panels()}
    return problems + [f"no such panel: {name}" for name in sorted(missing)]


if __name__ == "__main__":
    sys.exit(main())
