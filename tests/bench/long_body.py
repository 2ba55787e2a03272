"""What a 1 MiB prompt does to the stream beside it.

    python -m tests.bench.long_body [--rounds 5] [--real]

One client reads a stream and stamps its events; another sends, in turn, nothing, and bodies of
1 MiB of each kind, one after the other: words in a prompt, one long word, words in a chat, token
ids. Each is refused in the end, as it is longer than the window: what is measured is what parsing,
rendering and tokenizing it cost the neighbour. Prints the gaps between the neighbour's tokens and
how long the long request took.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import numpy as np

from tests.serving.servers import running_server

SIZE = (1 << 20) - 4096  # below the limit of a body, with room for what is around it
WORDS = ("the quick brown fox jumps over the lazy dog and runs " * (SIZE // 40))[:SIZE]
BODIES = {
    "nothing": None,
    "words": ("/v1/completions", {"prompt": WORDS, "max_tokens": 1}),
    "one word": ("/v1/completions", {"prompt": "a" * SIZE, "max_tokens": 1}),
    "a chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 1},
    ),
    "a chat with <|im_end|>": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "<|im_end|>" + WORDS}], "max_tokens": 1},
    ),
    "token ids": ("/v1/completions", {"prompt": [7] * (SIZE // 3), "max_tokens": 1}),
}


def post(url: str, path: str, body: bytes, stamps: list[float] | None = None) -> int:
    """Send; stamp each line of the answer. Return the status."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    for line in answer:
        if stamps is not None and line.startswith(b"data: {"):
            stamps.append(time.perf_counter())
    connection.close()
    return answer.status


def measure(url: str, kind: tuple[str, dict[str, object]] | None, num_tokens: int):
    """Return the neighbour's gaps, in seconds, and what the long requests took, with a status."""
    neighbour = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    stamps: list[float] = []
    reading = threading.Thread(
        target=post, args=(url, "/v1/completions", json.dumps(neighbour).encode(), stamps)
    )
    reading.start()
    while len(stamps) < 5:
        time.sleep(0.001)
    taken, statuses = [], set()
    payload = None if kind is None else json.dumps(kind[1], separators=(",", ":")).encode()
    while reading.is_alive():
        if kind is None or payload is None:
            reading.join()
            break
        began = time.perf_counter()
        statuses.add(post(url, kind[0], payload))
        taken.append(time.perf_counter() - began)
    return np.diff(stamps[5:]), taken, statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real", action="store_true", help="SmolLM2 instead of --fake")
    args = parser.parse_args()
    num_tokens = 150 if args.real else 400
    gaps: dict[str, list[np.ndarray]] = {name: [] for name in BODIES}
    took: dict[str, list[float]] = {name: [] for name in BODIES}
    seen: dict[str, set[int]] = {name: set() for name in BODIES}
    with ExitStack() as stack:
        server = stack.enter_context(running_server(*([] if args.real else ["--fake"])))
        for _ in range(args.rounds):
            for name, kind in BODIES.items():
                found, taken, statuses = measure(server.url, kind, num_tokens)
                gaps[name].append(found)
                took[name] += taken
                seen[name] |= statuses
    print(f"gaps of the stream beside, ms; {args.rounds} rounds of {num_tokens} tokens")
    print(f"{'1 MiB of':>24} {'p50':>8} {'p99':>8} {'largest':>8}   the long one, ms")
    for name in BODIES:
        ms = 1000 * np.concatenate(gaps[name])
        cells = " ".join(f"{value:8.2f}" for value in (*np.percentile(ms, (50, 99)), ms.max()))
        long = f"{1000 * np.median(took[name]):8.0f} {sorted(seen[name])}" if took[name] else ""
        print(f"{name:>24} {cells}   {long}")


if __name__ == "__main__":
    main()
