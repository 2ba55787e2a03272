"""Restarts all instances under load, one after the other, and kills Ray's head; judges each answer.

    python -m tests.bench.rolling [--num 2000] [--instances 2] [--head] [--seed 0]

`hocket restart` again and again until so many streams were answered; what drained how long. With
--head the GCS of the Ray session is killed in the middle of the load instead: streams that run go
on, new ones are served, for --after seconds. Ends with 1 if a stream failed or differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import aiohttp

from tests.bench.judged import Clients, known, questions
from tests.serving.servers import RunningServer, running_server


async def restart_while(server: RunningServer, running: asyncio.Task[None]) -> int:
    num = 0
    while not running.done():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from serving.cli import main; main()",
            "restart", "--admin", server.admin_url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        if process.returncode != 0:
            print(said.decode())
            raise SystemExit(f"hocket restart ended with {process.returncode}")
        num += 1
    return num


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def head_of(pid: int) -> int:
    """Return the GCS among what a server has started."""
    for child in descendants(pid):
        if Path(f"/proc/{child}/comm").read_text().startswith("gcs_server"):
            return child
    raise SystemExit("the server runs no Ray")


async def measure(server: RunningServer, args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        pairs = await known(session, server.url, questions(rng, (10, 60), 40, num_of_each=3))
        clients = Clients(session, server.url, pairs, rng)
        start_s = time.monotonic()
        if args.head:
            running = asyncio.create_task(clients.run(args.clients))
            await asyncio.sleep(2)
            os.kill(head_of(server.process.pid), signal.SIGKILL)
            num_before = len(clients.told)
            await asyncio.sleep(args.after)
            clients.end()
            await running
            what = f"{len(clients.told) - num_before} streams in {args.after} s without a head"
        else:
            running = asyncio.create_task(clients.run(args.clients, args.num))
            what = f"{await restart_while(server, running)} rolling restarts"
    print(f"{what}, {time.monotonic() - start_s:.0f} s, seed {args.seed}")
    for outcome, count in clients.outcomes.most_common():
        print(f"  {count:6}  {outcome}")
    return int(set(clients.outcomes) != {"as undisturbed"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--after", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines: list[str] = []
    with running_server(
        "--fake", "--instances", str(args.instances), "--admin-port", "0"
    ) as server:
        threading.Thread(target=lines.extend, args=(server.process.stderr,), daemon=True).start()
        failed = asyncio.run(measure(server, args))
        status = server.terminate()
    seconds = sorted(
        float(found[1]) for line in lines if (found := re.search(r"drained.*?([0-9.]+) s", line))
    )
    if seconds:
        median = seconds[len(seconds) // 2]
        print(f"drains: {len(seconds)}, median {median:.2f} s, max {seconds[-1]:.2f} s")
    if status != 0:
        print(f"the exit status is {status}")
    return int(failed or status != 0)


if __name__ == "__main__":
    sys.exit(main())
