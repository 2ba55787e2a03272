"""Kills instances at random moments under load, and judges every stream to the token.

    python -m tests.bench.kills [--num 200] [--model smollm2-135m] [--clients 8] [--seed 0]

Two instances; one is killed (SIGKILL) at a time, at a random moment, and the next one when both are
up again. Greedy, seeded, penalties, stop strings, log-probabilities, n = 2, echo, chat and whole
answers, each known from before the first kill. Pause: the gap in a stream that went on elsewhere.
Ends with 1 if an answer failed or differs in any token, score, reason or count.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from typing import Any

import aiohttp

from tests.bench.judged import Clients, known, open_at, questions
from tests.serving.servers import RunningServer, running_server

_PATIENCE_S = 120.0
# Every incarnation counts as one that was well, so that each restart waits for the first back-off.
_PRELUDE = "from serving.cluster import supervisor; supervisor.WELL_AFTER_S = 0.0"


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as response:
        return await response.json()


async def metric(session: aiohttp.ClientSession, server: RunningServer, name: str) -> float:
    async with session.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
    )


async def both_up(
    session: aiohttp.ClientSession, server: RunningServer, killed: int | None = None
) -> dict[str, int]:
    """Wait until they are, and none is the process that was killed; return the process of each."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        instances = (await get(session, f"{server.admin_url}/admin/status"))["instances"]
        if len(instances) == 2 and all(each["state"] == "up" for each in instances):
            pids = {each["instance"]: each["pid"] for each in instances}
            if killed not in pids.values():
                return pids
        await asyncio.sleep(0.02)
    raise SystemExit("an instance does not come back")


async def measure(server: RunningServer, args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        lengths = (30, 120) if args.model is None else (24, 64)
        max_words = 120 if args.model is None else 60
        asked = questions(rng, lengths, max_words, num_of_each=3)
        pairs = await known(session, server.url, asked)
        clients = Clients(session, server.url, pairs, rng)
        running = asyncio.create_task(clients.run(args.clients))
        pauses: list[float] = []
        for turn in range(args.num):
            pids = await both_up(session, server)
            await asyncio.sleep(rng.uniform(0.05, args.interval))
            victim = rng.choice(sorted(pids))
            killed_s = time.monotonic()
            os.kill(pids[victim], signal.SIGKILL)
            await both_up(session, server, pids[victim])
            pauses.append(killed_s)
            if turn % 20 == 19:
                print(f"  {turn + 1} kills, {sum(clients.outcomes.values())} streams", flush=True)
        clients.end()
        await running
        replays = int(await metric(session, server, "hocket_request_replays_total"))
    gaps: list[float] = []
    kinds: Counter[str] = Counter()
    for at_s in pauses:
        found = sorted(open_at(clients.told, at_s), key=lambda each: -each[1])
        kinds.update(kind for kind, _ in found)
        # About half of the open streams were on the instance that was killed.
        streams = [gap for kind, gap in found if kind != "whole"]
        gaps += streams[: max(1, len(streams) // 2)]
    print(f"{args.num} kills, seed {args.seed}; {replays} replays in all")
    for outcome, count in clients.outcomes.most_common():
        print(f"  {count:6}  {outcome}")
    print("  open at a kill  " + ", ".join(f"{name} {n}" for name, n in kinds.most_common()))
    cuts = statistics.quantiles(gaps, n=100)
    print(
        f"  gap at a kill, longer half of the open streams: p50 {cuts[49] * 1e3:.0f} ms, "
        f"p99 {cuts[98] * 1e3:.0f} ms, max {max(gaps) * 1e3:.0f} ms ({len(gaps)})"
    )
    return int(set(clients.outcomes) != {"as undisturbed"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds up at the most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    which = ("--fake",) if args.model is None else (args.model, "--batch-invariant")
    flags = (*which, "--instances", "2", "--admin-port", "0")
    with running_server(*flags, prelude=_PRELUDE) as server:
        threading.Thread(target=deque, args=(server.process.stderr, 0), daemon=True).start()
        failed = asyncio.run(measure(server, args))
        status = server.terminate()
    if status != 0:
        print(f"the exit status is {status}")
    return int(failed or status != 0)


if __name__ == "__main__":
    sys.exit(main())
