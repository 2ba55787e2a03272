"""Clients that hang up at random moments, and what the server still holds for them afterwards.

    python -m tests.bench.disconnects [--num 300] [--model MODEL] [--seed 0]

They leave while queued, in the middle of a long prompt, in the middle of an answer, streaming or
not; some after they have sent a line end behind their request. Ends with 1 unless, afterwards,
every block is free or cached, no prefix is marked as being computed, no stream, request or ticket
is left, and the gauges are 0; and says after how many steps and milliseconds that was so. Without
MODEL it is the checksum executor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from tests.serving.servers import RunningServer, running_server

FLAGS = (
    *("--max-num-running", "8", "--max-num-batched-tokens", "64", "--admin-port", "0"),
    *("--max-queue-age", "0", "--max-num-waiting-tokens", "10000000"),  # so that they queue
)
_TIMEOUT_S = 30


async def hang_up(url: str, rng: random.Random, longest_s: float, seen: Counter[str]) -> None:
    """Ask for much and leave: before the answer, or after a few of its events."""
    at = urlsplit(url)
    is_stream = rng.random() < 0.7
    prompt = "word " * rng.choice([1, 20, 400])  # the last takes many steps of 64 tokens
    body = json.dumps(
        {"prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}
        | {"n": rng.choice([1, 1, 1, 2])}
    ).encode()
    await asyncio.sleep(rng.random() * longest_s / 2)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    phase = "waiting or in its prompt"
    behind = b"\r\n" if rng.random() < 0.3 else b""  # what some clients send after a body
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        if behind:
            await asyncio.sleep(0.01)
            writer.write(behind)
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * longest_s):
                line = await reader.readline()
                phase = "decoding" if b" 200 " in line else f"refused: {line[9:12].decode()}"
                for _ in range(rng.randint(10, 200)):
                    await reader.readline()
    finally:
        if behind:
            phase += ", with a line end behind the request"
        seen[phase if is_stream else f"whole answer, {phase}"] += 1
        if rng.random() < 0.5:
            writer.transport.abort()  # a reset instead of an orderly end
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=_TIMEOUT_S) as answer:
        return str(answer.read().decode())


def metric(url: str, name: str) -> float:
    page = get(url, "/metrics")
    return sum(float(found) for found in re.findall(rf"(?m)^{name}(?:{{.*}})? (\S+)$", page))


def leftovers(server: RunningServer) -> list[str]:
    """Return what is held although nobody is there."""
    state: dict[str, Any] = json.loads(get(server.admin_url, "/debug/state"))
    found = []
    if state["streams"]:
        found.append(f"{len(state['streams'])} streams")
    if state["cluster"]["assigned"]:
        found.append(f"{len(state['cluster']['assigned'])} assigned requests")
    entered = state["admission"]["server"]
    if any(entered.values()) or state["admission"]["tenants"]:
        found.append(f"admission {entered}")
    for instance in state["instances"].values():
        queues = ("running", "waiting", "steps_in_flight")
        found += [f"{len(instance[queue])} {queue}" for queue in queues if instance[queue]]
        if instance["prefixes_computing"]:
            found.append(f"{instance['prefixes_computing']} prefixes being computed")
        kv = instance["kv"]
        num_there = sum(num for name in ("free_runs", "idle") for _, num in kv[name])
        if num_there != kv["num_blocks"]:
            found.append(f"{kv['num_blocks'] - num_there} blocks")
        found += [name for name in ("tables", "leases", "claims") if kv[name]]
    for gauge in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        if metric(server.url, f"hocket_{gauge}"):
            found.append(gauge)
    return found


async def storm(url: str, num: int, seed: int, longest_s: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    rngs = [random.Random(f"{seed} {number}") for number in range(num)]
    await asyncio.gather(*(hang_up(url, rng, longest_s, seen) for rng in rngs))
    return seen


def settle(server: RunningServer) -> tuple[list[str], float, float]:
    """Wait until nothing is left; return what is, and the steps and seconds that it took."""
    start_s, num_steps = time.monotonic(), metric(server.url, "hocket_steps_total")
    while (found := leftovers(server)) and time.monotonic() < start_s + _TIMEOUT_S:
        time.sleep(0.002)
    num_steps = metric(server.url, "hocket_steps_total") - num_steps
    return found, num_steps, time.monotonic() - start_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--model", help="by default the checksum executor")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds that a client stays")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with running_server(args.model or "--fake", *FLAGS) as server:
        seen = asyncio.run(storm(server.url, args.num, args.seed, args.longest))
        found, num_steps, took_s = settle(server)
        status = server.terminate()
    print(f"seed {args.seed}: {args.num} clients left: {dict(seen)}")
    print(
        f"left over: {', '.join(found) or 'nothing'}, after {num_steps:g} steps and "
        f"{took_s * 1000:.0f} ms"
    )
    return int(bool(found) or num_steps > 2 or status != 0)


if __name__ == "__main__":
    sys.exit(main())
