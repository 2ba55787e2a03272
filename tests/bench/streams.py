"""What a streamed token costs the API process, and what a stream does.

    python -m tests.bench.streams [--num 200 1000] [--step 0.05 0.2] [--seconds 10] [--rounds 3]
    python -m tests.bench.streams --url http://127.0.0.1:8001 --pid PID --model m

N streams of `POST /v1/completions` run at a time, and this process reads them: raw sockets, one
epoll, and events counted as what begins with `data: `. A round prints CPU time (user + system) of
the API process alone over the tokens of a window in which all streams run, and by how much its own
memory has grown from none of them to all. The server is `hocket serve --fake` with steps of a fixed
length, long enough for each token to be an event of its own; the last number of a round, tokens an
event, says whether that was so. With `--url` it is a server with vLLM's metrics, whose API process
is `--pid`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.serving.servers import running_server

_START_TIMEOUT_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Server(NamedTuple):
    url: str
    pid: int
    model: str

    def cpu_s(self) -> tuple[float, float]:
        """Return its CPU time so far: user, system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS

    def memory_kib(self) -> int:
        """Return what the process has of its own, swapped out or not."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(values[name].split()[0]) for name in ("RssAnon", "VmSwap"))

    def num_tokens(self) -> float:
        """Return how many tokens it has generated, by its metrics."""
        for path in ("/metrics/vllm", "/metrics"):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(self.url + path, timeout=60) as page,
            ):
                lines = page.read().decode().splitlines()
                name = "vllm:generation_tokens_total"
                return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
        raise RuntimeError("it has no metrics")


class Streams:
    """So many open streams, and how many events each has brought."""

    def __init__(self, server: Server, num: int, max_tokens: int) -> None:
        at = urlsplit(server.url)
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._ends: dict[int, bytes] = {}  # of what came, as an event may come in two pieces
        self.num_events: dict[int, int] = {}
        for index in range(num):
            body = json.dumps(
                {
                    "model": server.model,
                    "prompt": f"{index:06} says",
                    "max_tokens": max_tokens,
                    "ignore_eos": True,
                    "stream": True,
                }
            ).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {at.netloc}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            stream = socket.create_connection((at.hostname or "", at.port or 80))
            stream.sendall(head.encode() + body)
            stream.setblocking(False)
            self._sockets[stream.fileno()] = stream
            self._ends[stream.fileno()] = b""
            self.num_events[stream.fileno()] = 0
            self._epoll.register(stream, select.EPOLLIN)

    @property
    def total(self) -> int:
        return sum(self.num_events.values())

    def read(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            for number, _ in self._epoll.poll(left_s):
                data = self._sockets[number].recv(1 << 16)
                if not data:
                    raise RuntimeError("a stream ended")
                data = self._ends[number] + data
                self.num_events[number] += data.count(b"data: ")
                self._ends[number] = data[-5:]

    def read_until_all_run(self) -> None:
        until_s = time.monotonic() + _START_TIMEOUT_S
        while not all(self.num_events.values()):
            if time.monotonic() > until_s:
                num = sum(map(bool, self.num_events.values()))
                raise RuntimeError(f"{num} of {len(self.num_events)} streams run")
            self.read(0.2)

    def close(self) -> None:
        for stream in self._sockets.values():
            stream.close()
        self._epoll.close()


class Cost(NamedTuple):
    user_us: float  # a token
    system_us: float
    kib_a_stream: float
    tokens_per_s: float
    tokens_an_event: float


def measure(server: Server, num: int, seconds: float, max_tokens: int) -> Cost:
    before_kib = server.memory_kib()
    streams = Streams(server, num, max_tokens)
    with contextlib.closing(streams):
        streams.read_until_all_run()
        streams.read(1.0)
        began_s, num_tokens = time.monotonic(), server.num_tokens()
        before_s, num_events = server.cpu_s(), streams.total
        streams.read(seconds)
        after_s, num_events = server.cpu_s(), streams.total - num_events
        num_tokens, took_s = server.num_tokens() - num_tokens, time.monotonic() - began_s
        kib = (server.memory_kib() - before_kib) / num
    streams_gone(server)
    user_us, system_us = (
        (after - before) / num_tokens * 1e6 for before, after in zip(before_s, after_s, strict=True)
    )
    return Cost(user_us, system_us, kib, num_tokens / took_s, num_tokens / num_events)


def streams_gone(server: Server) -> None:
    """Return when it generates nothing any more."""
    before = -1.0
    while (now := server.num_tokens()) != before:
        before = now
        time.sleep(1.0)


@contextlib.contextmanager
def our_server(num: int, step_s: float) -> Iterator[Server]:
    flags = [
        *("--fake", "--fake-step", str(step_s), "--max-num-running", str(num)),
        *("--max-num-batched-tokens", str(4 * num), "--max-num-waiting-tokens", str(64 * num)),
    ]
    with running_server(*flags) as server:
        yield Server(server.url, server.process.pid, server.model)
        server.terminate()


def rounds(server: Server, num: int, args: argparse.Namespace) -> None:
    warm_up = Streams(server, 8, 32)  # what is imported and made once is nobody's
    with contextlib.closing(warm_up):
        warm_up.read_until_all_run()
        warm_up.read(1.0)
    streams_gone(server)
    costs = []
    for number in range(args.rounds):
        cost = measure(server, num, args.seconds, args.max_tokens)
        costs.append(cost)
        print(
            f"{num} streams: {cost.user_us:5.1f} + {cost.system_us:4.1f} us a token; "
            f"{cost.kib_a_stream:6.1f} KiB a stream{' (freed ones used again)' if number else ''}; "
            f"{cost.tokens_per_s:,.0f} tokens/s, {cost.tokens_an_event:.2f} an event",
            flush=True,
        )
    us_a_token = statistics.median(cost.user_us + cost.system_us for cost in costs)
    print(f"{num} streams: {us_a_token:.1f} us a token, {costs[0].kib_a_stream:.1f} KiB a stream")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--step", type=float, nargs="+", default=[0.05, 0.2], help="of each")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=4000)
    parser.add_argument("--url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--model")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.url is not None:
        for num in args.num:
            rounds(Server(args.url, args.pid, args.model), num, args)
        return
    for num, step_s in zip(args.num, args.step, strict=True):
        with our_server(num, step_s) as server:
            rounds(server, num, args)


if __name__ == "__main__":
    main()
