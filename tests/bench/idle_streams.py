"""What silent streams cost: memory, CPU, and the TTFT of one that comes later.

    python -m tests.bench.idle_streams [--num 1000] [--seconds 20]

Streams wait for their turn behind two that run and run, and get a keep-alive comment every five
seconds; their clients read nothing. TTFT is that of a request that is before them in the queue,
from the moment when a place is made for it. The server is `--fake`.
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
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
    )
    return reader, writer


async def ttft_ms(
    server: RunningServer, holder: asyncio.StreamWriter
) -> tuple[float, asyncio.StreamWriter]:
    """Return the median of requests for each of which the holder of a place leaves.

    It counts from then to the first event. The last holder is returned as well.
    """
    found = []
    for _ in range(NUM_PROBES):
        reader, writer = await ask(server, max_tokens=1, priority=-1)
        await asyncio.sleep(0.05)  # they are tokenised on threads, and must not change places
        next_holder = await ask(server, max_tokens=8000, priority=-1)
        await asyncio.sleep(0.1)
        start_s = time.monotonic()
        holder.close()
        await reader.readuntil(b"data: ")
        found.append(time.monotonic() - start_s)
        await reader.readuntil(b"[DONE]")
        writer.close()
        holder = next_holder[1]
    return statistics.median(found) * 1000, holder


async def cpu(server: RunningServer, seconds: float) -> float:
    start_s, used_s = time.monotonic(), server_cpu_s(server)
    await asyncio.sleep(seconds)
    return (server_cpu_s(server) - used_s) / (time.monotonic() - start_s)


async def measure(server: RunningServer, num: int, seconds: float) -> None:
    forever = await ask(server, max_tokens=8000, priority=-1)
    _, holder = await ask(server, max_tokens=8000, priority=-1)
    before_ms, holder = await ttft_ms(server, holder)
    before_kib, before_cpu = memory_kib(server), await cpu(server, seconds)
    idle = [await ask(server, max_tokens=8000, priority=1) for _ in range(num)]
    await asyncio.sleep(2)
    after_kib, after_cpu = memory_kib(server), await cpu(server, seconds)
    after_ms, holder = await ttft_ms(server, holder)
    assert not forever[0].at_eof(), "it ran all the time"
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
        *("--max-num-running", "2", "--max-num-waiting", str(args.num + 10)),
        *("--scheduling-policy", "priority", "--max-queue-age", "0", "--sse-keep-alive", "5"),
    ]
    with running_server("--fake", *flags) as server:
        asyncio.run(measure(server, args.num, args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
