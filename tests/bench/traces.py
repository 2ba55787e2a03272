"""Real loads against Hocket: a trace of arrivals, a trace with shared prefixes, conversations.

    python -m tests.bench.traces azure TRACE           against a real model, five minutes
    python -m tests.bench.traces mooncake TRACE        against --fake, ten minutes
    python -m tests.bench.traces conversations         against --fake, a minute

azure: from second 600 at a fiftieth of the trace's speed, lengths shortened to 4,096 tokens.
mooncake: 600 requests, all lengths divided by 16; the server's hit rate with room for every block,
and with room for a quarter, beside what the trace repeats and what an LRU cache would hit of it.
Ends with 1 if the first is off by more than half a point.
conversations: 100 of two to five turns, through a proxy that keeps what passes: every prompt of a
later turn must begin with the prompt before it and the text that the server answered to it.
Each ends with 1 if a request failed or was not sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import aiohttp
from aiohttp import web

from loadgen.metrics import summarize
from loadgen.report.files import read_json
from loadgen.servers import free_port
from loadgen.types import Run
from loadgen.workload.build import WorkloadSpec, build_plan
from loadgen.workload.reuse import lru_reuse, num_distinct_tokens, unbounded_reuse
from loadgen.workload.traces import Slice, cut_trace, read_trace
from serving.progress import NoProgress
from serving.store.local import resolve
from tests.loadgen.mocks import LOADGEN
from tests.serving.servers import running_server

MAX_OFF = 0.005
FAKE_TOKEN_BYTES = 8  # of KV memory
MOONCAKE = Slice(num_requests=600, divisor=16, max_context=8192)


def load(url: str, *flags: object) -> Run:
    """Run the load generator, show its report, and return what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        words = [*LOADGEN, "run", url, *map(str, flags), "--json", str(file)]
        status = subprocess.run(words, check=False).returncode
        if status:
            sys.exit(status)
        run = read_json(file)
    failed = [record.error for record in run.records if not record.ok]
    if failed or run.num_unsent:
        sys.exit(f"{len(failed)} requests failed, {run.num_unsent} were not sent: {failed[:3]}")
    return run


def azure(trace: Path) -> None:
    model = resolve(None, NoProgress())
    with running_server("--max-model-len", "4096") as server:
        load(
            server.url,
            *("--trace", trace, "--trace-start-s", 600, "--trace-speed", 0.02),
            *("--duration-s", 300, "--max-context", 4096, "--tokenizer", model.path),
        )


def mooncake(path: Path) -> bool:
    trace = cut_trace(read_trace(path), MOONCAKE)
    whole = num_distinct_tokens(trace)
    flags: list[object] = ["--trace", path, "--num-sessions", len(trace.requests)]
    flags += ["--trace-divisor", MOONCAKE.divisor, "--max-context", MOONCAKE.max_context]
    flags += ["--tokenizer", "bytes", "--concurrency", 8]
    lines, is_right = [], False
    for title, num_tokens in (("all", 2 * whole), ("a quarter", whole // 4)):
        with running_server("--fake", "--kv-memory", str(FAKE_TOKEN_BYTES * num_tokens)) as server:
            run = load(server.url, *flags, "--cache-tokens", num_tokens)
        reference = lru_reuse(trace.requests, trace.block_tokens, num_tokens // trace.block_tokens)
        found = summarize(run).throughput.hit_rate or 0.0
        off = found - reference.token_ratio
        lines.append(
            f"{title:>10}: {num_tokens:,} tokens of KV, {found:.2%} of the prompt tokens from the "
            f"cache; {reference.token_ratio:.2%} by the reference ({100 * off:+.2f} points)"
        )
        if title == "all":
            assert reference == unbounded_reuse(trace.requests, trace.block_tokens)
            is_right = abs(off) <= MAX_OFF
    print("\n".join(lines))
    return is_right


def conversations() -> bool:
    spec = WorkloadSpec(
        num_sessions=100,
        rate=6.0,
        turns="uniform:2-5",
        think="0.3",
        prompt_tokens="48",
        output_tokens="12",
        tokenizer="bytes",
    )
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in changed(spec).items()]
    with running_server("--fake") as server, recording_proxy(server.url) as (url, exchanges):
        load(url, *(word for pair in flags for word in pair))
    num_turns = [len(session.turns) for session in build_plan(spec)]
    said = {prompt + answer for prompt, answer in exchanges}
    num_later = sum(
        any(prompt.startswith(before + "\n\n") for before in said) for prompt, _ in exchanges
    )
    print(
        f"{len(exchanges)} prompts of {len(num_turns)} conversations, {num_later} of them begin "
        f"with all that was said before; planned: {sum(num_turns)}, {sum(num_turns) - 100} of them "
        "later turns"
    )
    return len(exchanges) == sum(num_turns) and num_later == sum(num_turns) - 100


def changed(spec: WorkloadSpec) -> dict[str, object]:
    """Return what differs from the defaults."""
    default = asdict(WorkloadSpec())
    return {name: value for name, value in asdict(spec).items() if value != default[name]}


@contextlib.contextmanager
def recording_proxy(url: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the address of a proxy to a server, and the prompts and answers that it has passed."""
    exchanges: list[tuple[str, str]] = []
    started, stop = threading.Event(), asyncio.Event()
    found: list[tuple[int, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        async with aiohttp.ClientSession() as client:

            async def get(request: web.Request) -> web.Response:
                async with client.get(url + request.path) as answer:
                    return web.json_response(await answer.json())

            async def post(request: web.Request) -> web.StreamResponse:
                body = await request.read()
                headers = {"content-type": request.content_type}
                async with client.post(url + request.path, data=body, headers=headers) as answer:
                    response = web.StreamResponse(status=answer.status)
                    await response.prepare(request)
                    seen = b""
                    async for data in answer.content.iter_any():
                        seen += data
                        await response.write(data)
                exchanges.append((json.loads(body)["prompt"], _text(seen)))
                return response

            app = web.Application()
            app.router.add_get("/v1/models", get)
            app.router.add_post("/v1/completions", post)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", free_port())
            await site.start()
            found.append((int(site.name.rpartition(":")[2]), asyncio.get_running_loop()))
            started.set()
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    port, loop = found[0]
    try:
        yield f"http://127.0.0.1:{port}", exchanges
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def _text(stream: bytes) -> str:
    """Return what the chunks of a completion say."""
    lines = [line[6:] for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["text"] for choice in choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("load", choices=("azure", "mooncake", "conversations"))
    parser.add_argument("trace", type=Path, nargs="?")
    args = parser.parse_args()
    if args.load == "conversations":
        sys.exit(not conversations())
    if args.trace is None:
        parser.error(f"{args.load} needs a trace")
    if args.load == "mooncake":
        sys.exit(not mooncake(args.trace))
    azure(args.trace)


if __name__ == "__main__":
    main()
