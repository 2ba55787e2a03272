"""Minutes of mixed load against a server that keeps a decision log, and the log replayed.

    python -m tests.bench.replay [--minutes 10] [--depth 2] [--model MODEL]

Completions with shared prefixes, several choices, priorities, penalties, log-
probabilities, stop strings and clients that leave. By default of the checksum executor. Ends with 1
if a decision differs when it is made again, or if a request fails in a way that it should not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from openai import APIStatusError, AsyncOpenAI

from serving.replay import report
from tests.serving.servers import running_server

NUM_CLIENTS = 24
SYSTEMS = [f"You are assistant number {number}. " * (4 + 3 * number) for number in range(4)]


async def client(api: AsyncOpenAI, model: str, rng: random.Random, end_s: float, seen: Counter):
    while time.monotonic() < end_s:
        await asyncio.sleep(rng.expovariate(4.0))
        try:
            await one_request(api, model, rng, seen)
        except APIStatusError as error:
            seen[f"HTTP {error.status_code}"] += 1


async def one_request(api: AsyncOpenAI, model: str, rng: random.Random, seen: Counter) -> None:
    prompt = rng.choice(SYSTEMS) + "word " * rng.randint(1, 200)
    stream = await api.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=rng.randint(1, 120),
        n=rng.choice([1, 1, 1, 3]),
        temperature=rng.choice([0.0, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logprobs=rng.choice([None, None, 3]),
        stop=rng.choice([None, None, ["aa", "e"]]),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"priority": rng.randint(0, 2), "cache_salt": rng.choice(["a", "a", "b"])},
    )
    patience = rng.choice([None, None, None, rng.randint(1, 20)])
    async for chunk in stream:
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            seen["cached tokens"] += (details and details.cached_tokens) or 0
            seen["prompt tokens"] += chunk.usage.prompt_tokens
        if patience is not None:
            patience -= 1
            if patience == 0:
                seen["clients that left"] += 1
                await stream.close()
                return
    seen["answered"] += 1


async def load(base_url: str, seconds: float, seed: int) -> Counter:
    api = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    model = (await api.models.list()).data[0].id
    seen: Counter = Counter()
    end_s = time.monotonic() + seconds

    async def show() -> None:
        while time.monotonic() < end_s:
            await asyncio.sleep(30)
            print(f"{end_s - time.monotonic():.0f} s left: {dict(seen)}", flush=True)

    clients = [
        client(api, model, random.Random(seed * 1000 + number), end_s, seen)
        for number in range(NUM_CLIENTS)
    ]
    progress = asyncio.create_task(show())
    await asyncio.gather(*clients)
    progress.cancel()
    await api.close()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="by default the checksum executor")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "decisions.jsonl"
        what = [args.model] if args.model else ["--fake"]
        flags = [
            *("--depth", str(args.depth), "--scheduling-policy", "priority"),
            *("--max-num-running", "16", "--decision-log", str(log)),
        ]
        with running_server(*what, *flags) as server:
            seen = asyncio.run(load(f"{server.url}/v1", 60 * args.minutes, args.seed))
            status = server.terminate()
        size = log.stat().st_size
        print(f"seed {args.seed}: {dict(seen)}; the log has {size / 1e6:.1f} MB", flush=True)
        start_s = time.monotonic()
        is_same = report(log)
        print(f"replay took {time.monotonic() - start_s:.1f} s")
    lacks = [kind for kind in ("answered", "cached tokens", "clients that left") if not seen[kind]]
    if lacks:
        print(f"the load was too tame, there is no: {', '.join(lacks)}")
    failed = any(name.startswith("HTTP 5") and name != "HTTP 503" for name in seen)
    return int(not is_same or failed or bool(lacks) or status != 0)


if __name__ == "__main__":
    sys.exit(main())
