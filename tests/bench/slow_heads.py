"""What clients that never finish their heads cost the others: `python -m tests.bench.slow_heads`.

Prints the latency of /v1/models without and with a thousand sockets that have sent half a head, in
turn. Reports, never a verdict.
"""

from __future__ import annotations

import contextlib
import statistics
import time

from tests.serving.raw import connect, receive, request
from tests.serving.servers import running_server

_NUM_SLOW, _NUM_REQUESTS, _ROUNDS = 1000, 300, 3
_HALF_A_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


def main() -> None:
    with running_server("--fake") as server:
        alone, beside = [], []
        for _ in range(_ROUNDS):
            alone += latencies_ms(server.url)
            with contextlib.ExitStack() as stack:
                slow = [stack.enter_context(connect(server.url)) for _ in range(_NUM_SLOW)]
                for raw in slow:
                    raw.sendall(_HALF_A_HEAD)
                beside += latencies_ms(server.url)
        for name, times in (("alone", alone), (f"beside {_NUM_SLOW} slow heads", beside)):
            p99 = statistics.quantiles(times, n=100)[98]
            print(f"{name:24} median {statistics.median(times):.2f} ms, p99 {p99:.2f} ms")


def latencies_ms(url: str) -> list[float]:
    times = []
    with connect(url) as raw:
        for _ in range(_NUM_REQUESTS):
            begun = time.perf_counter()
            raw.sendall(request("GET", "/v1/models"))
            receive(raw)
            times.append(1000 * (time.perf_counter() - begun))
    return times


if __name__ == "__main__":
    main()
