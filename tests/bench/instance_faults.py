"""Kills and freezes the process of the model in turn, under load, and looks at what is left.

    python -m tests.bench.instance_faults [--rounds 50] [--watchdog-timeout 2]

A server of the checksum executor over HTTP; half of the clients stream. For each round: how long
until the server knows (`/health` is 503), and until it is ready again; the requests that ran go on
then. After the last: all processes that the server has started, and its open files,
against those before the first. Each restart waits for the first back-off only, as if every
incarnation had served for a minute. Ends with 1 if a client saw anything but its whole answer, or a
503 for a request that came meanwhile; if a death was known later than 1 s after it, or a freeze
later than 1 s after the limit; or on a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from tests.serving.servers import RunningServer, children_of, running_server

NUM_CLIENTS = 16
MAX_TOKENS = (10, 40, 160, 640)
_POLL_S = 0.005
_PATIENCE_S = 60.0
_MAX_LATE_S = 1.0
# Every incarnation counts as one that was well.
_PRELUDE = "from serving.cluster import supervisor; supervisor.WELL_AFTER_S = 0.0"
Times = dict[str, list[dict[str, float]]]  # by fault, for each round
PROPER = ("answered", "503 no_instance")


class Clients:
    """A closed loop of clients, and what each request came to."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._session = session
        self._url = url
        self._is_over = False

    async def run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(NUM_CLIENTS)))

    def end(self) -> None:
        self._is_over = True

    async def _client(self, number: int) -> None:
        while not self._is_over:
            try:
                length = MAX_TOKENS[number // 2 % len(MAX_TOKENS)]
                outcome = await self._ask(length, stream=number % 2 == 0)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                outcome = f"{type(error).__name__}: {error}"
            self.outcomes[outcome] += 1
            if outcome.startswith("503"):
                await asyncio.sleep(0.1)

    async def _ask(self, length: int, *, stream: bool) -> str:
        body = {"prompt": "Once", "max_tokens": length, "ignore_eos": True, "stream": stream}
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            payload = await response.read()
        if response.status != 200:
            error = json.loads(payload)["error"]
            if response.status == 503 and "retry-after" not in response.headers:
                return "503 without Retry-After"
            return f"{response.status} {error['code']}"
        if not stream:
            num_tokens = json.loads(payload)["usage"]["completion_tokens"]
            return "answered" if num_tokens == length else f"{num_tokens} tokens of {length}"
        *events, done, rest = payload.split(b"\n\n")
        last = json.loads(events[-1].removeprefix(b"data: "))
        end = ", [DONE]" if (done, rest) == (b"data: [DONE]", b"") else ", torn"
        if "error" in last:
            return f"event {last['error']['code']}{end}"
        return "answered" if end == ", [DONE]" else f"answered{end}"


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not await condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {_PATIENCE_S:g} s in vain until {what}")
        await asyncio.sleep(_POLL_S)


async def one_round(
    session: aiohttp.ClientSession, server: RunningServer, number: signal.Signals
) -> dict[str, float]:
    async def status(path: str) -> int:
        async with session.get(f"{server.url}{path}") as response:
            return response.status

    async def is_loaded() -> bool:
        async with session.get(f"{server.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return any(
            line.startswith("hocket_requests_running{")
            and float(line.split()[-1]) > NUM_CLIENTS / 2
            for line in lines
        )

    async def is_known() -> bool:
        return await status("/health") == 503

    async def is_ready() -> bool:
        return await status("/ready") == 200

    await until(is_loaded, "most clients are served")
    await asyncio.sleep(0.3)  # so that some are answered
    (child,) = children_of(server.process.pid)
    start_s = time.monotonic()
    os.kill(child, number)
    times = {}
    for name, condition in (("known", is_known), ("ready", is_ready)):
        await until(condition, f"it is {name} after {number.name}")
        times[name] = time.monotonic() - start_s
    if is_there(child):
        raise SystemExit(f"process {child} is still there")
    return times


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def files_of(pid: int) -> Counter[str]:
    """Count open files by kind: socket, pipe, memfd, anon_inode, file."""
    kinds: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        target = str(path.readlink())
        kind = "memfd" if "memfd:" in target else target.split(":")[0]
        kinds[kind if not kind.startswith("/") else "file"] += 1
    return kinds


def processes_of(pid: int) -> Counter[str]:
    """Count all that descends from a process, whichever thread started it, by what it runs."""
    programs: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            programs[next((Path(word).name for word in words[1:] if "." in word), "?")] += 1
            programs += processes_of(child)
    return programs


def too_late(times: Times, watchdog_timeout_s: float) -> list[str]:
    """Return which of the bounds were broken, in words."""
    limits = {"SIGKILL": _MAX_LATE_S, "SIGSTOP": watchdog_timeout_s + _MAX_LATE_S}
    return [
        f"{fault} was known after {one['known']:.2f} s, and {limits[fault]:g} s is the most"
        for fault, rounds in times.items()
        for one in rounds
        if one["known"] > limits[fault]
    ]


async def measure(server: RunningServer, num_rounds: int) -> tuple[Times, Counter[str]]:
    times: Times = {"SIGKILL": [], "SIGSTOP": []}
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        clients = Clients(session, server.url)
        running = asyncio.create_task(clients.run())
        for turn in range(num_rounds):
            number = (signal.SIGKILL, signal.SIGSTOP)[turn % 2]
            times[number.name].append(await one_round(session, server, number))
        clients.end()
        await running
    return times, clients.outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--watchdog-timeout", type=float, default=2.0)
    args = parser.parse_args()
    flags = ("--fake", "--watchdog-timeout", str(args.watchdog_timeout))
    with running_server(*flags, prelude=_PRELUDE) as server:
        # A server whose log nobody reads stands still once the pipe is full.
        threading.Thread(target=deque, args=(server.process.stderr, 0), daemon=True).start()
        pid = server.process.pid
        asyncio.run(measure(server, 0))  # what the first requests open for good is open
        time.sleep(1.0)
        before, ran_before = files_of(pid), processes_of(pid)
        times, outcomes = asyncio.run(measure(server, args.rounds))
        time.sleep(1.0)
        after, ran_after = files_of(pid), processes_of(pid)
        status = server.terminate()
    print(
        f"{args.rounds} rounds, watchdog limit {args.watchdog_timeout:g} s; seconds after the fault"
    )
    for fault, rounds in times.items():
        for name in rounds[0] if rounds else ():
            values = [one[name] for one in rounds]
            print(
                f"  {fault} until {name:<6} median {statistics.median(values):6.3f}"
                f"   max {max(values):6.3f}   ({len(values)} rounds)"
            )
    print("what became of requests")
    for outcome, count in outcomes.most_common():
        print(f"  {count:6}  {outcome}")
    print(f"open files before {dict(before)}\n           after  {dict(after)}")
    print(f"processes  before {dict(ran_before)}\n           after  {dict(ran_after)}")
    wrong = [f"a client saw: {outcome}" for outcome in outcomes if outcome not in PROPER]
    wrong += too_late(times, args.watchdog_timeout)
    if before != after:
        wrong.append("open files differ")
    if ran_before != ran_after:
        wrong.append("processes differ")
    if status != 0:
        wrong.append(f"the exit status is {status}")
    print("\n".join(wrong) or "nothing was wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
