"""What the whole stack adds to instances and their router: HTTP, text, the processes and Ray.

    python -m tests.bench.stack_cost [--rounds 3] [--num 128] [--seed 0]

Arms, in the order A-B-B-A in each round: (A) the driver with both instances in this process and
no HTTP; (B) `hocket serve --instances 2` over HTTP. Both run the checksum executor with steps of
exactly 20 ms. A closed loop of 1, 8, 32 clients; streams of 16 to 48 tokens and a random moment
between them, or else all clients march in step with each other and with the instance. Ends with 1
if the median over pairs of the added TTFT p50 is over 3 ms, or of TPOT over 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, cast

from engine.build import build_engine
from engine.config import EngineConfig
from engine.startup import StartupTimes
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.types import InstanceId, RequestId, RequestSpec, SamplingParams
from serving.cluster.driver import ClusterDriver
from serving.cluster.hosts.inproc import InProcessHandle
from serving.metrics import Metrics
from serving.progress import NoProgress
from serving.text.tokenizer import fake_codec
from tests.serving.servers import running_server

STEP_S = 0.020
NUM_TOKENS = (16, 48)
MAX_TTFT_MS, MAX_TPOT = 3.0, 1.02
_CODEC = fake_codec()


class Times(NamedTuple):
    ttft_s: float
    tpot_s: float


Ask = Callable[[str, int], Awaitable[Times]]


async def in_process(driver: ClusterDriver, prompt: str, num_tokens: int) -> Times:
    start_s = time.perf_counter()
    spec = RequestSpec(
        request_id=RequestId(f"{prompt}"),
        prompt_token_ids=tuple(_CODEC.encode(prompt, add_special_tokens=False)),
        params=SamplingParams(max_tokens=num_tokens),
    )
    times = [time.perf_counter() async for _ in driver.submit([spec], []).news()]
    return _times(start_s, times, num_tokens)


class Connections:
    """HTTP by hand, on connections that stay open: a client library would count as the stack."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)
        self._free: list[_Connection] = []

    async def ask(self, prompt: str, num_tokens: int) -> Times:
        fields = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        body = json.dumps({"prompt": prompt} | fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._free = [each for each in self._free if not each.transport.is_closing()]
        if self._free:
            connection = self._free.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        start_s = time.perf_counter()
        times = await connection.exchange(head.encode() + body)
        self._free.append(connection)
        return _times(start_s, times, num_tokens)


class _Connection(asyncio.Protocol):
    """Notes when each event comes, and wakes nobody before the last."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._times += [time.perf_counter()] * data.count(b"data: {")
        self._received.append(data)
        if data.endswith(b"0\r\n\r\n"):  # no event ends so
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(exc or ConnectionResetError("the server hung up"))

    async def exchange(self, request: bytes) -> list[float]:
        self._received: list[bytes] = []
        self._times: list[float] = []
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._ended
        received = b"".join(self._received)
        assert received.startswith(b"HTTP/1.1 200 "), received[:500]
        assert b'"error"' not in received, received[-500:]
        assert received.count(b"data: {") == len(self._times), "an event came in two pieces"
        return self._times


def _times(start_s: float, times: list[float], num_tokens: int) -> Times:
    """What came late may have come with what was next."""
    return Times(times[0] - start_s, (times[-1] - times[0]) / (num_tokens - 1))


async def load(ask: Ask, concurrency: int, num: int, rng: random.Random) -> list[Times]:
    num = max(num * concurrency // 8, 4)  # so that each concurrency takes as long
    prompts = [f"{rng.randrange(10**12):012} says" for _ in range(num)]
    found: list[Times] = []

    async def client() -> None:
        while prompts:
            prompt = prompts.pop()
            await asyncio.sleep(rng.uniform(0, 2 * STEP_S))
            found.append(await ask(prompt, rng.randint(*NUM_TOKENS)))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return found


async def measure(url: str, args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    config = EngineConfig(model_name="fake", model_folder=None, fake_step_s=STEP_S)
    build = partial(build_engine, config, StartupTimes(NoProgress()))
    driver = ClusterDriver(ClusterScheduler(), _CODEC, Metrics("fake"))
    for number in range(args.instances):
        await driver.start(InProcessHandle(InstanceId(f"i{number}"), build))
    arms: dict[str, Ask] = {"A": partial(in_process, driver), "B": Connections(url).ask}
    is_over = False
    for arm in arms.values():
        await load(arm, 8, 16, rng)
    for concurrency in (1, 8, 32):
        ttft, tpot = [], []
        shown: dict[str, list[tuple[float, float]]] = {"A": [], "B": []}
        for _ in range(args.rounds):
            for name in "ABBA":
                found = await load(arms[name], concurrency, args.num, rng)
                ttft_s = statistics.median(each.ttft_s for each in found)
                tpot_s = statistics.median(each.tpot_s for each in found)
                shown[name].append((ttft_s, tpot_s))
        for a, b in zip(shown["A"], shown["B"], strict=True):
            ttft.append((b[0] - a[0]) * 1e3)
            tpot.append(b[1] / a[1])
        added, ratio = statistics.median(ttft), statistics.median(tpot)
        is_over |= added > MAX_TTFT_MS or ratio > MAX_TPOT
        a_ttft, b_ttft = (statistics.median(x[0] for x in shown[n]) * 1e3 for n in "AB")
        a_tpot, b_tpot = (statistics.median(x[1] for x in shown[n]) * 1e3 for n in "AB")
        print(
            f"c{concurrency:<3} TTFT p50 {a_ttft:6.2f} -> {b_ttft:6.2f} ms, added {added:+.2f} "
            f"({min(ttft):+.2f} to {max(ttft):+.2f})   TPOT {a_tpot:6.3f} -> {b_tpot:6.3f} ms, "
            f"x {ratio:.4f} ({min(tpot):.4f} to {max(tpot):.4f})",
            flush=True,
        )
    await driver.stop()
    return int(is_over)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=128, help="requests at 8 clients")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.rounds} rounds, steps of {STEP_S * 1e3:g} ms")
    flags = ("--fake", "--fake-step", str(STEP_S), "--instances", str(args.instances))
    with running_server(*flags) as server:
        threading.Thread(target=deque, args=(server.process.stderr, 0), daemon=True).start()
        status = asyncio.run(measure(server.url, args))
        server.terminate()
    return status


if __name__ == "__main__":
    sys.exit(main())
