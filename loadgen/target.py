"""Whom requests are sent to: an OpenAI-compatible endpoint, and what its stream says.

Owns the HTTP client, the request's body, and the meaning of events and errors. It knows no plan and
no schedule: it sends one request now and fills in its record.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

import aiohttp
import msgspec

from loadgen.shown import plain, without_user
from loadgen.sse import EventSplitter
from loadgen.types import LoadError, Plan, Prompt, Record

Endpoint = Literal["completions", "chat"]
CONNECT_S = 10.0
_MAX_DETAIL = 200
_MAX_SHOWN_BYTES = 16 << 10  # of an answer that is no stream
_MOST_TOKENS = 1 << 40  # of which any count, sum and ratio is exact
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_EVENT_STARTS = (b":", b"data:", b"event:", b"id:", b"retry:")


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
        path = "/v1/completions" if self.endpoint == "completions" else "/v1/chat/completions"
        clock = asyncio.get_running_loop().time
        stream = _Stream(record, clock, zero_s)
        record.sent_at_s = clock() - zero_s
        try:
            body = msgspec.json.encode(self._body(outgoing))
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            record.error, record.detail = "unsendable", _shortened(_named(error))
            record.end_at_s = record.sent_at_s
            return
        try:
            async with self._session.post(self.url + path, data=body) as response:
                if response.status != 200:
                    record.error = f"http_{response.status}"
                    record.detail = _shortened(await _start_of(response.content))
                else:
                    await stream.read(response.content)
        except asyncio.CancelledError:
            record.error = "interrupted"
            raise
        except aiohttp.ConnectionTimeoutError:
            within_s = min(self.timeout_s, CONNECT_S)
            record.error, record.detail = "connect_timeout", f"no connection within {within_s:g} s"
        except TimeoutError:
            record.error, record.detail = "timeout", f"no end within {self.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            is_own = error.errno in _NO_DESCRIPTORS
            record.error = "no_descriptors" if is_own else "refused"
            record.detail = _shortened(str(error))
        except (aiohttp.ClientError, OSError) as error:
            record.error, record.detail = "disconnected", _shortened(str(error) or repr(error))
        except Exception as error:  # noqa: BLE001 (no answer may end the run)
            record.error, record.detail = "bad_answer", _shortened(_named(error))
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
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_S)),
    )


async def served_model(url: str, api_key: str) -> str:
    """Ask a server for the first model it serves. Raises LoadError."""
    shown = without_user(url)
    try:
        session = open_session(api_key, 10.0)
        async with session, session.get(f"{url}/v1/models") as answer:
            if answer.status != 200:
                said = _shortened(await _start_of(answer.content))
                raise LoadError(
                    f"{shown}/v1/models answered {answer.status}: {said}",
                    "name the model with --model, and the key with --api-key if it wants one",
                )
            listed = msgspec.json.decode(await answer.read())
            return str(listed["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise LoadError(
            f"no server answers at {shown}: {_shortened(str(error) or repr(error))}",
            "start it, or give another address",
        ) from error
    except (msgspec.MsgspecError, LookupError, TypeError, RecursionError) as error:
        raise LoadError(
            f"{shown}/v1/models does not answer as OpenAI's API does", "name the model with --model"
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
        self._start = b""  # of the answer, while no event came

    async def read(self, content: aiohttp.StreamReader) -> None:
        splitter, has_begun = EventSplitter(), False
        async for data in content.iter_any():
            now_s = self._clock() - self._zero_s
            events = splitter.feed(data)
            for event in events:
                self._take(event, now_s)
            if events:
                has_begun = True
            elif not has_begun and len(self._start) < _MAX_SHOWN_BYTES:
                self._start += data[:_MAX_SHOWN_BYTES]
        record = self._record
        if self._is_done or record.finish_reason or record.error:
            return
        start = self._start.lstrip()
        if has_begun or not start or start.startswith(_EVENT_STARTS):
            record.error, record.detail = "disconnected", "the stream just ended"
        else:
            said = start.decode(errors="replace")
            record.error, record.detail = (
                "bad_answer",
                _shortened(f"not a stream of events: {said}"),
            )

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
            if 0 < event.sent_ns < 1 << 63:
                record.stamped_at_s.append(event.sent_ns * 1e-9 - self._zero_s)

    def _count(self, usage: _Usage) -> None:
        self._record.num_prompt_tokens = _bounded(usage.prompt_tokens or 0)
        self._num_counted = _bounded(usage.completion_tokens or 0)
        details = usage.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            self._record.num_cached_tokens = _bounded(details.cached_tokens)


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


def _bounded(num_tokens: int) -> int:
    """Return what a server says it counted, as a number that one can go on with."""
    return min(max(0, num_tokens), _MOST_TOKENS)


async def _start_of(content: aiohttp.StreamReader) -> str:
    """Read no more of an answer than is shown of it, whatever bytes it is made of."""
    start = b""
    while len(start) < _MAX_SHOWN_BYTES and (data := await content.readany()):
        start += data
    return start[:_MAX_SHOWN_BYTES].decode(errors="replace")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _shortened(text: str) -> str:
    """Make a line of what a server said, with nothing in it that could steer a terminal."""
    return plain(" ".join(without_user(text).split()), _MAX_DETAIL)
