"""Requests of every kind whose whole answer is known, asked again, and judged to the token.

For benches that disturb a server: first the answers of the undisturbed one are taken down.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

Answer = dict[str, Any]
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}
_WORDS = ["time", "light", "river", "stone", "cloud", "paper", "green", "seven", "winter", "open"]
_RULES = {"frequency_penalty": 0.6, "presence_penalty": 0.4, "repetition_penalty": 1.2}


class Question(NamedTuple):
    """What is asked, and how."""

    kind: str
    body: Answer
    is_chat: bool = False
    is_whole: bool = False  # not as a stream


KINDS: dict[str, Answer] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 1},
    "penalties": {"temperature": 0.8, "seed": 2} | _RULES,
    "logprobs": {"temperature": 0, "logprobs": 3, "seed": 4},
    "n = 2": {"temperature": 1.0, "seed": 3, "n": 2},
    "echo": {"temperature": 0, "logprobs": 1, "echo": True, "seed": 4},
    "whole": {"temperature": 0.5, "seed": 5, "logprobs": 1},
    "chat": {"temperature": 0.7, "seed": 6, "logprobs": True, "top_logprobs": 2},
}


def questions(
    rng: random.Random, max_tokens: tuple[int, int], max_words: int, num_of_each: int
) -> list[Question]:
    """Return some of each kind but those with stop strings, which need an answer first."""
    found = []
    for kind, settings in KINDS.items():
        for _ in range(num_of_each):
            prompt = " ".join(rng.choices(_WORDS, k=rng.randint(4, max_words)))
            body = settings | {"max_tokens": rng.randint(*max_tokens), "ignore_eos": True}
            if kind == "chat":
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body |= {"prompt": prompt, "return_token_ids": True}
            found.append(Question(kind, body, kind == "chat", kind == "whole"))
    return found


@dataclass
class Told:
    """What one client got: the answer, and when its events came."""

    kind: str
    answer: Answer | None = None
    error: str = ""
    times_s: list[float] = field(default_factory=list)


async def ask(session: aiohttp.ClientSession, url: str, question: Question) -> Told:
    """Ask; whatever goes wrong is in `error`."""
    told = Told(question.kind, times_s=[time.monotonic()])
    path = "/v1/chat/completions" if question.is_chat else "/v1/completions"
    body = question.body if question.is_whole else question.body | _STREAM
    try:
        async with session.post(f"{url}{path}", json=body) as response:
            if response.status != 200:
                told.error = f"{response.status} {(await response.text())[:200]}"
            elif question.is_whole:
                whole = await response.json()
                told.answer = {"choices": whole["choices"], "usage": _counts(whole["usage"])}
                told.times_s.append(time.monotonic())
            else:
                await _read(response, told)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        told.error = f"{type(error).__name__}: {error}"
    return told


async def _read(response: aiohttp.ClientResponse, told: Told) -> None:
    choices: dict[int, Answer] = {}
    usage, is_done = None, False
    async for line in response.content:
        if is_done and line.strip():
            told.error = "something after the end"
            return
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
            return
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            _add(choices.setdefault(choice["index"], {}), choice)
    if not is_done or usage is None:
        told.error = "torn"
    else:
        told.answer = {"choices": choices, "usage": _counts(usage)}


def _counts(usage: Answer) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


def _add(whole: Answer, choice: Answer) -> None:
    text = choice["text"] if "text" in choice else choice["delta"].get("content")
    whole["text"] = whole.get("text", "") + (text or "")
    whole.setdefault("token_ids", []).extend(choice.get("token_ids") or ())
    for key, values in (choice.get("logprobs") or {}).items():
        whole.setdefault(key, []).extend(values or ())
    if choice["finish_reason"]:
        whole["finish_reason"] = choice["finish_reason"]


async def known(
    session: aiohttp.ClientSession, url: str, asked: list[Question]
) -> list[tuple[Question, Answer]]:
    """Return each question with its answer, and the greedy ones with a stop string besides."""
    pairs: list[tuple[Question, Answer]] = []
    for question in asked:
        answer = await _undisturbed(session, url, question)
        pairs.append((question, answer))
        if question.kind == "greedy":
            text = answer["choices"][0]["text"]
            # Long enough to lie in several tokens, so that it may be half matched at any moment.
            middle = len(text) * 2 // 3
            stopped = Question("stop", question.body | {"stop": [text[middle : middle + 12]]})
            answer = await _undisturbed(session, url, stopped)
            assert answer["choices"][0]["finish_reason"] == "stop", stopped
            pairs.append((stopped, answer))
    return pairs


async def _undisturbed(session: aiohttp.ClientSession, url: str, question: Question) -> Answer:
    told = await ask(session, url, question)
    if told.answer is None:
        raise SystemExit(f"undisturbed, {question.kind}: {told.error}")
    return told.answer


class Clients:
    """A closed loop of clients that ask at random; counts what each answer was worth."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        pairs: list[tuple[Question, Answer]],
        rng: random.Random,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.told: list[Told] = []
        self._session = session
        self._url = url
        self._pairs = pairs
        self._rng = rng
        self._is_over = False
        self._left: int | None = None

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
            question, expected = self._rng.choice(self._pairs)
            told = await ask(self._session, self._url, question)
            self.told.append(told)
            if told.error:
                self.outcomes[f"failed: {told.error}"] += 1
                print(f"failed: {told.error[:200]}, {str(question)[:200]}", flush=True)
            elif told.answer != expected:
                self.outcomes["WRONG"] += 1
                print(f"wrong: {question}\n  got {told.answer}\n  not {expected}"[:600], flush=True)
            else:
                self.outcomes["as undisturbed"] += 1


def open_at(told: list[Told], at_s: float) -> list[tuple[str, float]]:
    """Return, for each answer that was open at a moment, its kind and the gap in it then."""
    found = []
    for one in told:
        for before, after in zip(one.times_s, one.times_s[1:], strict=False):
            if before <= at_s < after:
                found.append((one.kind, after - before))
    return found
