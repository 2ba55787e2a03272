"""What silent streams cost: memory, CPU, and the TTFT of one that comes later.

    python -m tests.bench.idle_streams [--num 1000] [--seconds 20]

Streams wait for their turn behind one that runs and runs, and get a keep-alive comment every five
seconds; their clients read nothing. TTFT is that of a request whose priority is above all others,
so that the one that runs gives way to it. The server is `--fake`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.overload import server_cpu_s
from tests.serving.servers import RunningServer, running_server

NUM_PROBES = 20


def memory_kib(server: RunningServer) -> int:
    """Return what the server's process has of its own, swapped out or not."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(values[name].split()[0]) for name in ("RssAnon", "VmSwap"))


async def ask(
    server: RunningServer, **body: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    at = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=4096)
    payload = json.dumps({"prompt": "a", "stream": True, "ignore_eos": True} | body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
    )
    return reader, writer


async def ttft_ms(server: RunningServer) -> float:
    """Return the median of requests one after the other, from sending to the first event."""
    found = []
    for _ in range(NUM_PROBES):
        start_s = time.monotonic()
        reader, writer = await ask(server, max_tokens=1, priority=-1)
        await reader.readuntil(b"data: ")
        found.append(time.monotonic() - start_s)
        await reader.readuntil(b"[DONE]")
        writer.close()
    return statistics.median(found) * 1000


async def cpu(server: RunningServer, seconds: float) -> float:
    start_s, used_s = time.monotonic(), server_cpu_s(server)
    await asyncio.sleep(seconds)
    return (server_cpu_s(server) - used_s) / (time.monotonic() - start_s)


async def measure(server: RunningServer, num: int, seconds: float) -> None:
    long = await ask(server, max_tokens=8000)
    await long[0].readuntil(b"data: ")
    before_kib, before_cpu = memory_kib(server), await cpu(server, seconds)
    before_ms = await ttft_ms(server)
    idle = [await ask(server, max_tokens=8000, priority=1) for _ in range(num)]
    await asyncio.sleep(2)
    after_kib = memory_kib(server)
    after_cpu, after_ms = await cpu(server, seconds), await ttft_ms(server)
    print(
        f"{len(idle)} idle streams: {(after_kib - before_kib) / num:.1f} KiB each; server CPU "
        f"{before_cpu:.3f} cores before, {after_cpu:.3f} with them; TTFT of a new request "
        f"{before_ms:.1f} ms before, {after_ms:.1f} with them (medians of {NUM_PROBES})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    flags = [
        *("--max-num-running", "1", "--max-num-waiting", str(args.num + 10)),
        *("--scheduling-policy", "priority", "--max-queue-age", "0", "--sse-keep-alive", "5"),
    ]
    with running_server("--fake", *flags) as server:
        asyncio.run(measure(server, args.num, args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
