"""Whom requests are sent to: an OpenAI-compatible endpoint, and what its stream says.

Owns the HTTP client, the request's body, and the meaning of events and errors. It knows no plan and
no schedule: it sends one request now and fills in its record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

import aiohttp
import msgspec

from loadgen.sse import EventSplitter, EventTooLong
from loadgen.types import LoadError, Plan, Prompt, Record

Endpoint = Literal["completions", "chat"]
_MAX_DETAIL = 200


class Message(NamedTuple):
    """What was said in a conversation, oldest first."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One request as it is sent."""

    prompt: Prompt | tuple[Message, ...]
    max_tokens: int
    tenant: str = "default"
    priority: int | None = None


class Target(Protocol):
    """Whom a run sends its requests to."""

    async def send(self, outgoing: Outgoing, record: Record, zero_s: float) -> None:
        """Send now, and fill in the record; times count from `zero_s`. Raises only if cancelled."""
        ...


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def said(self) -> str:
        if self.delta is None:
            return self.text or ""
        delta = self.delta
        return delta.content or delta.reasoning_content or delta.reasoning or ""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None
    sent_ns: int = 0  # a mock server's monotonic clock


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True, kw_only=True)
class OpenAITarget:
    """Streams from `/v1/completions` or `/v1/chat/completions`. Use it as a context manager."""

    url: str  # without /v1
    model: str
    endpoint: Endpoint = "completions"
    api_key: str = ""
    timeout_s: float = 600.0
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = open_session(self.api_key, self.timeout_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, outgoing: Outgoing, record: Record, zero_s: float) -> None:
        assert self._session is not None
        body = msgspec.json.encode(self._body(outgoing))
        path = "/v1/completions" if self.endpoint == "completions" else "/v1/chat/completions"
        clock = asyncio.get_running_loop().time
        stream = _Stream(record, clock, zero_s)
        record.sent_at_s = clock() - zero_s
        try:
            async with self._session.post(self.url + path, data=body) as response:
                if response.status != 200:
                    record.error = f"http_{response.status}"
                    record.detail = _shortened(await response.text(errors="replace"))
                else:
                    await stream.read(response.content)
        except asyncio.CancelledError:
            record.error = "interrupted"
            raise
        except TimeoutError:
            record.error, record.detail = "timeout", f"no end within {self.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            record.error, record.detail = "refused", _shortened(str(error))
        except (aiohttp.ClientError, OSError) as error:
            record.error, record.detail = "disconnected", _shortened(str(error) or repr(error))
        except (msgspec.MsgspecError, EventTooLong) as error:
            record.error, record.detail = "bad_answer", _shortened(repr(error))
        finally:
            record.end_at_s = clock() - zero_s
            stream.finish()

    def _body(self, outgoing: Outgoing) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": outgoing.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "completions":
            body["prompt"] = _text(outgoing.prompt)
        else:
            body["messages"] = _messages(outgoing.prompt)
        if self.ignore_eos:
            body["ignore_eos"] = True
        if outgoing.tenant != "default":
            body["user"] = outgoing.tenant
        if outgoing.priority is not None:
            body["priority"] = outgoing.priority
        return body | self.extra


def open_session(api_key: str, timeout_s: float) -> aiohttp.ClientSession:
    """Return a client without a limit of connections: the plan alone says how many there are."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, 10.0)),
    )


async def served_model(url: str, api_key: str) -> str:
    """Ask a server for the first model it serves. Raises LoadError."""
    try:
        session = open_session(api_key, 10.0)
        async with session, session.get(f"{url}/v1/models") as answer:
            if answer.status != 200:
                raise LoadError(
                    f"{url}/v1/models answered {answer.status}: {_shortened(await answer.text())}",
                    "name the model with --model, and the key with --api-key if it wants one",
                )
            listed = msgspec.json.decode(await answer.read())
            return str(listed["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise LoadError(
            f"no server answers at {url}: {_shortened(str(error) or repr(error))}",
            "start it, or give another address",
        ) from error
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise LoadError(
            f"{url}/v1/models does not answer as OpenAI's API does", "name the model with --model"
        ) from error


class _Stream:
    """Reads one answer into its record."""

    def __init__(self, record: Record, clock: Callable[[], float], zero_s: float) -> None:
        self._record = record
        self._clock = clock
        self._zero_s = zero_s
        self._pieces: list[str] = []
        self._num_counted = 0
        self._is_done = False

    async def read(self, content: aiohttp.StreamReader) -> None:
        splitter = EventSplitter()
        async for data in content.iter_any():
            now_s = self._clock() - self._zero_s
            for event in splitter.feed(data):
                self._take(event, now_s)
        if not (self._is_done or self._record.finish_reason or self._record.error):
            self._record.error, self._record.detail = "disconnected", "the stream just ended"

    def finish(self) -> None:
        self._record.text = "".join(self._pieces)
        self._record.num_output_tokens = self._num_counted or len(self._pieces)

    def _take(self, data: bytes, now_s: float) -> None:
        record = self._record
        if data.startswith(b"[DONE]"):
            self._is_done = True
            return
        event = _decode(data)
        if event.error:
            record.error = "stream_error"
            record.detail = _shortened(msgspec.json.encode(event.error).decode())
        if event.usage is not None:
            self._count(event.usage)
        said = ""
        for choice in event.choices:
            said += choice.said()
            record.finish_reason = choice.finish_reason or record.finish_reason
        if said:
            self._pieces.append(said)
            record.received_at_s.append(now_s)
            if event.sent_ns:
                record.stamped_at_s.append(event.sent_ns * 1e-9 - self._zero_s)

    def _count(self, usage: _Usage) -> None:
        self._record.num_prompt_tokens = usage.prompt_tokens or 0
        self._num_counted = usage.completion_tokens or 0
        if usage.prompt_tokens_details is not None:
            self._record.num_cached_tokens = usage.prompt_tokens_details.cached_tokens or 0


def check(plan: Plan, endpoint: Endpoint) -> None:
    """Raise LoadError for a plan that is empty, or that such an endpoint cannot be sent."""
    if not plan:
        raise LoadError("the plan is empty", "ask for more, or for a longer part of a trace")
    for session in plan:
        for turn in session.turns:
            if isinstance(turn.prompt, str):
                continue
            if endpoint == "chat":
                raise LoadError(
                    "a chat cannot be sent as token ids", "use --endpoint completions, or text"
                )
            if len(session.turns) > 1:
                raise LoadError(
                    "a conversation cannot be made of token ids", "leave --token-ids out"
                )


def _messages(prompt: Prompt | tuple[Message, ...]) -> Sequence[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [message._asdict() for message in prompt if isinstance(message, Message)]


def _text(prompt: Prompt | tuple[Message, ...]) -> str | Sequence[int]:
    """Return a conversation as a text that goes on: answers follow what they are answers to."""
    if isinstance(prompt, str):
        return prompt
    text, ids = "", []
    for part in prompt:
        if isinstance(part, Message):
            text += f"\n\n{part.content}" if text and part.role == "user" else part.content
        else:
            ids.append(part)
    return ids or text


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_DETAIL else text[: _MAX_DETAIL - 3] + "..."
