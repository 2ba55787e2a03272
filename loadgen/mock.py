"""A server that answers like a model of a given speed and stamps each chunk with its clock.

`hocket bench mock` starts it: to try a client, or a load generator, against latencies that are
known. While it is frozen its time stands still, but for the stamps: nothing is answered or sent,
and all that was due is due that much later, as with a process that is stopped for a while.

    POST /v1/completions, /v1/chat/completions (stream or not), GET /v1/models, /health
    GET /stamps: TTFT, ITL and TPOT by its own stamps, for clients that do not read them
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
from aiohttp import web

from loadgen.distribution import distribution
from loadgen.flags import Whole
from loadgen.timing import precise_loop
from loadgen.types import LoadError

MODEL = "mock"
_WORD = " word"
_MOST_STAMPS = 1_000_000
_LONGEST = 1e9  # of a time in the configuration, in its own unit


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """How the mock server behaves.

    Parameters
    ----------
    ttft_ms
        Milliseconds to the first token.
    itl_ms
        Milliseconds between tokens.
    default_tokens
        Length of an answer when the request does not say.
    error_rate
        Share of requests that fail.
    error_status
        With which status.
    disconnect_rate
        Share of answers that are cut off in the middle.
    freeze_at_s
        Seconds after the first request at which the server stands still.
    freeze_s
        For how many seconds.
    seed
        Of which requests fail.
    """

    ttft_ms: float = 50.0
    itl_ms: float = 10.0
    default_tokens: Whole = 16
    error_rate: float = 0.0
    error_status: Whole = 500
    disconnect_rate: float = 0.0
    freeze_at_s: float = 0.0
    freeze_s: float = 0.0
    seed: Whole = 0

    def due_s(self, index: int) -> float:
        """Return when a token is due, after the request came."""
        return (self.ttft_ms + index * self.itl_ms) / 1000


class Clock:
    """Time of a server that stands still from `freeze_at_s` on for `freeze_s`.

    Both are counted from the first request, or, before it, from nothing.
    """

    def __init__(self, config: MockConfig, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._freeze_at_s, self._freeze_s = config.freeze_at_s, config.freeze_s
        self._zero_s: float | None = None

    def now(self) -> float:
        """Return the server's time, 0 at the first call."""
        if self._zero_s is None:
            self._zero_s = self._monotonic()
        return self.inner(self._monotonic() - self._zero_s)

    def inner(self, outer_s: float) -> float:
        """Return the server's time at a real one."""
        return outer_s - min(max(0.0, outer_s - self._freeze_at_s), self._freeze_s)

    def outer(self, inner_s: float) -> float:
        """Return the real time by which the server's time has passed `inner_s`."""
        return inner_s + (self._freeze_s if inner_s >= self._freeze_at_s else 0.0)

    async def until(self, inner_s: float) -> None:
        """Sleep until this time of the server."""
        assert self._zero_s is not None
        delay_s = self._zero_s + self.outer(inner_s) - self._monotonic()
        if delay_s > 0:
            await asyncio.sleep(delay_s)


class MockServer:
    """The handlers; `app` is to be served by aiohttp."""

    def __init__(self, config: MockConfig) -> None:
        self.config = config
        self.clock = Clock(config, time.monotonic)
        self.num_requests = 0
        self.ttfts_s = deque[float](maxlen=_MOST_STAMPS)  # of streamed answers
        self.itls_s = deque[float](maxlen=_MOST_STAMPS)
        self.tpots_s = deque[float](maxlen=_MOST_STAMPS)
        self._rng = random.Random(config.seed)  # noqa: S311 (which requests fail)
        self.app = web.Application(client_max_size=64 << 20)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/stamps", self._stamps)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_post("/v1/completions", self._completions)
        self.app.router.add_post("/v1/chat/completions", self._chat)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"num_requests": self.num_requests})

    async def _stamps(self, _: web.Request) -> web.Response:
        kinds = {"ttft": self.ttfts_s, "itl": self.itls_s, "tpot": self.tpots_s}
        return web.json_response({name: _said(values_s) for name, values_s in kinds.items()})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        came_ns, start_s = time.monotonic_ns(), self.clock.now()
        config = self.config
        body = msgspec.json.decode(await request.read())
        self.num_requests += 1
        is_error = self._rng.random() < config.error_rate
        is_cut = self._rng.random() < config.disconnect_rate
        await self.clock.until(start_s)  # it may be frozen
        if is_error:
            error = {"message": "the mock was told to fail", "type": "mock"}
            return web.json_response({"error": error}, status=config.error_status)
        num_tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)
        num_tokens = num_tokens or config.default_tokens
        usage = {"prompt_tokens": _num_prompt_tokens(body), "completion_tokens": num_tokens}
        usage["total_tokens"] = usage["prompt_tokens"] + num_tokens
        if not body.get("stream"):
            await self.clock.until(start_s + config.due_s(num_tokens - 1))
            return web.json_response(_whole(num_tokens, usage, is_chat=is_chat))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        sent_ns = [came_ns]
        with suppress(ConnectionResetError):  # the client left
            await response.prepare(request)
            head, tail = _chunk(is_chat=is_chat)
            for index in range(num_tokens):
                if is_cut and index == num_tokens // 2:
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await self.clock.until(start_s + config.due_s(index))
                sent_ns.append(time.monotonic_ns())
                await response.write(head % sent_ns[-1] + tail)
            else:
                await response.write(_end(body, usage, is_chat=is_chat))
                await response.write_eof()
        if len(sent_ns) > 1:
            self._note(sent_ns)
        return response

    def _note(self, stamps_ns: list[int]) -> None:
        """Keep what the stamps of an answer say; the first is of its request."""
        ttft_s, *itls_s = ((after - before) * 1e-9 for before, after in pairwise(stamps_ns))
        self.ttfts_s.append(ttft_s)
        self.itls_s.extend(itls_s)
        if itls_s:
            self.tpots_s.append(sum(itls_s) / len(itls_s))


def serve(config: MockConfig, port: int) -> None:
    """Serve on loopback until SIGINT or SIGTERM. Raises LoadError if it cannot be."""
    _check(config, port)
    url = f"http://127.0.0.1:{port}"
    said = (
        f"Mock server at {url}/v1, model {MODEL}: first token after {config.ttft_ms:g} ms, "
        f"then one every {config.itl_ms:g} ms\nNext: hocket bench run {url}"
    )

    def tell(_: str) -> None:  # once it listens
        print(said, flush=True)  # noqa: T201 (the command's result)

    app, loop = MockServer(config).app, precise_loop()
    try:
        web.run_app(app, host="127.0.0.1", port=port, print=tell, access_log=None, loop=loop)
    except OSError as error:
        raise LoadError(
            f"port {port}: {os.strerror(error.errno or 0)}", "name another one with --port"
        ) from error


def _check(config: MockConfig, port: int) -> None:
    """Raise LoadError for what no server can be."""
    if not 0 < port < 1 << 16:
        raise LoadError(f"{port} is no port", "give one from 1 to 65535 with --port")
    spans = ("ttft_ms", "itl_ms", "freeze_at_s", "freeze_s")
    wrong = [name for name in spans if not 0 <= getattr(config, name) <= _LONGEST]
    wrong += [
        name for name in ("error_rate", "disconnect_rate") if not 0 <= getattr(config, name) <= 1
    ]
    if not 400 <= config.error_status <= 599:
        wrong.append("error_status")
    if not 1 <= config.default_tokens <= _MOST_STAMPS:
        wrong.append("default_tokens")
    if wrong:
        flag = wrong[0].replace("_", "-")
        raise LoadError(
            f"the mock server cannot have a --{flag} of {getattr(config, wrong[0]):g}",
            "times are finite and not negative, rates from 0 to 1, the status from 400 to 599, "
            "tokens from 1",
        )


def _said(values_s: Iterable[float]) -> dict[str, float | None]:
    found = distribution(values_s)
    return {"num": found.num, "p50_s": found.p50_s, "p99_s": found.p99_s}


def _num_prompt_tokens(body: dict[str, Any]) -> int:
    """Count words, or token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    if isinstance(prompt, str):
        return len(prompt.split())
    return sum(len(str(message.get("content")).split()) for message in body.get("messages", ()))


def _chunk(*, is_chat: bool) -> tuple[bytes, bytes]:
    """Return a token's event, in two parts with the stamp between them."""
    said: dict[str, Any] = {"delta": {"content": _WORD}} if is_chat else {"text": _WORD}
    event: dict[str, Any] = {"choices": [{"index": 0, **said, "finish_reason": None}], "created": 0}
    event |= {"id": "mock", "object": _object(is_chat=is_chat), "model": MODEL}
    return b'data: {"sent_ns":%d,', msgspec.json.encode(event)[1:] + b"\n\n"


def _end(body: dict[str, Any], usage: dict[str, int], *, is_chat: bool) -> bytes:
    empty: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    head = {"id": "mock", "object": _object(is_chat=is_chat), "created": 0, "model": MODEL}
    events = [head | {"choices": [{"index": 0, **empty, "finish_reason": "length"}]}]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(head | {"choices": [], "usage": usage})
    data = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)
    return data + b"data: [DONE]\n\n"


def _whole(num_tokens: int, usage: dict[str, int], *, is_chat: bool) -> dict[str, Any]:
    text = _WORD * num_tokens
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    )
    choice: dict[str, Any] = {"index": 0, **said, "finish_reason": "length"}
    kind = "chat.completion" if is_chat else "text_completion"
    return {
        "id": "mock",
        "object": kind,
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": usage,
    }


def _object(*, is_chat: bool) -> str:
    return "chat.completion.chunk" if is_chat else "text_completion"
