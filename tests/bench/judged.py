"""Requests of every kind whose whole answer is known, asked as streams, and judged to the token.

For benches that disturb a server: first the answers of the undisturbed one are taken down.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Answer = dict[str, Any]
_STREAM = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
_WORDS = ["time", "light", "river", "stone", "cloud", "paper", "green", "seven", "winter", "open"]


@dataclass
class Told:
    """What one client got: the answer, and when its events came."""

    answer: Answer | None
    error: str = ""
    times_s: list[float] = field(default_factory=list)


async def ask(session: aiohttp.ClientSession, url: str, body: Answer) -> Told:
    """Ask for a stream; whatever goes wrong is in `error`."""
    told = Told(None)
    choices: dict[int, Answer] = {}
    usage, is_done = None, False
    try:
        async with session.post(f"{url}/v1/completions", json=body | _STREAM) as response:
            if response.status != 200:
                told.error = f"{response.status} {(await response.text())[:200]}"
                return told
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                payload = line[6:].strip()
                if payload == b"[DONE]":
                    is_done = True
                    continue
                told.times_s.append(time.monotonic())
                event = json.loads(payload)
                if "error" in event:
                    told.error = f"event {event['error']['code']}"
                    return told
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    _add(choices.setdefault(choice["index"], {}), choice)
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        told.error = f"{type(error).__name__}: {error}"
        return told
    if not is_done or usage is None:
        told.error = "torn"
    told.answer = {"choices": choices, "usage": usage and usage["completion_tokens"]}
    return told


def _add(whole: Answer, choice: Answer) -> None:
    whole["text"] = whole.get("text", "") + choice["text"]
    whole.setdefault("token_ids", []).extend(choice.get("token_ids") or ())
    scores = choice.get("logprobs")
    if scores:
        for key, values in scores.items():
            whole.setdefault(key, []).extend(values or ())
    if choice["finish_reason"]:
        whole["finish_reason"] = choice["finish_reason"]


def bodies(rng: random.Random, max_tokens: tuple[int, int], num_of_each: int) -> list[Answer]:
    """Return requests of each kind, without stop strings: those need an answer first."""
    kinds: list[Answer] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "frequency_penalty": 0.6, "presence_penalty": 0.4,
         "repetition_penalty": 1.2, "seed": 2},
        {"temperature": 0, "logprobs": 3, "seed": 4},
        {"temperature": 1.0, "seed": 3, "n": 2},
    ]  # fmt: skip
    found = []
    for kind in kinds:
        for _ in range(num_of_each):
            prompt = " ".join(rng.choices(_WORDS, k=rng.randint(4, 60)))
            found.append(
                kind
                | {"prompt": prompt, "max_tokens": rng.randint(*max_tokens), "ignore_eos": True}
            )
    return found


async def known(
    session: aiohttp.ClientSession, url: str, asked: list[Answer]
) -> list[tuple[Answer, Answer]]:
    """Return each request with its answer, and as many with a stop string as there are greedy."""
    pairs = []
    for body in asked:
        told = await ask(session, url, body)
        if told.error:
            raise SystemExit(f"undisturbed: {told.error}")
        assert told.answer is not None
        pairs.append((body, told.answer))
        if body["temperature"] == 0 and "logprobs" not in body:
            text = told.answer["choices"][0]["text"]
            # Long enough to lie in several tokens, so that it may be half matched at any moment.
            middle = len(text) * 2 // 3
            stopped = body | {"stop": [text[middle : middle + 6]]}
            told = await ask(session, url, stopped)
            assert told.answer is not None, told.error
            assert told.answer["choices"][0]["finish_reason"] == "stop", stopped
            pairs.append((stopped, told.answer))
    return pairs


def kind_of(body: Answer) -> str:
    names = ("stop", "n", "logprobs", "frequency_penalty", "seed")
    return next((name for name in names if name in body), "greedy")


class Clients:
    """A closed loop of clients that ask at random; counts what each answer was worth."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        pairs: list[tuple[Answer, Answer]],
        rng: random.Random,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.told: list[Told] = []
        self.open: dict[int, float] = {}  # by client, when its last event came
        self._session = session
        self._url = url
        self._pairs = pairs
        self._rng = rng
        self._is_over = False

    async def run(self, num_clients: int, num_requests: int | None = None) -> None:
        """Ask until `end`, or until so many requests are answered."""
        self._left = num_requests
        await asyncio.gather(*(self._client() for _ in range(num_clients)))

    def end(self) -> None:
        self._is_over = True

    async def _client(self) -> None:
        while not self._is_over:
            if self._left is not None:
                if self._left <= 0:
                    return
                self._left -= 1
            body, expected = self._rng.choice(self._pairs)
            told = await ask(self._session, self._url, body)
            self.told.append(told)
            self.kinds[kind_of(body)] += 1
            if told.error:
                self.outcomes[f"failed: {told.error}"] += 1
            elif told.answer != expected:
                self.outcomes["WRONG"] += 1
                print(f"wrong: {body}\n  got {told.answer}\n  not {expected}"[:600])
            else:
                self.outcomes["as undisturbed"] += 1


def longest_gaps(told: list[Told], at_s: float) -> list[float]:
    """Return, for each stream that was open at a moment, the gap between its events then."""
    gaps = []
    for one in told:
        for before, after in zip(one.times_s, one.times_s[1:], strict=False):
            if before <= at_s < after:
                gaps.append(after - before)
    return sorted(gaps, reverse=True)
