"""From token streams to answers, whole or in chunks: what completions and chat have in common."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from scheduler.types import FinishReason
from serving.api import sse
from serving.api.gate import pass_of
from serving.api.logprobs import prompt_logprobs
from serving.api.responses import in_pieces, json_response
from serving.api.sampling import Body
from serving.api.service import Service
from serving.api.timings import server_timing, timings
from serving.cluster.streams import Delta, RequestStream, StreamGroup
from serving.text.tokenizer import TextCodec


class ChoiceForm(Protocol):
    """What one endpoint puts into `choices[i]`, beside what every endpoint does."""

    @property
    def codec(self) -> TextCodec: ...

    @property
    def body(self) -> Body: ...

    def whole(self, index: int, delta: Delta, stream: RequestStream) -> dict[str, Any]: ...

    def chunk(
        self, index: int, delta: Delta, stream: RequestStream, *, first: bool
    ) -> dict[str, Any]: ...

    def of_all(self, stream: RequestStream) -> dict[str, Any]:
        """Return what stands beside `choices`, once."""
        ...


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


async def respond(
    service: Service, request: Request, group: StreamGroup, head: dict[str, Any], form: ChoiceForm
) -> Response:
    """Answer as the body asks, in events or whole. Raises RequestError, ClientGone."""
    body = form.body
    deadline_s = math.inf
    if body.timeout is not None:  # tokenizing has taken some of it
        deadline_s = request.state.arrived_at_s + body.timeout
    open_answer = service.open_answer(group, pass_of(request), deadline_s)
    if body.stream:
        return sse.event_stream(
            _chunks(group, head, form), open_answer, _text_events(group, head, form)
        )
    with open_answer:
        deltas = await _collect(request, group)

    first = group.streams[0]
    is_long = _has_scores(first)
    answer = {"usage": usage(body, group)} | form.of_all(first)
    headers = {}
    if body.return_metrics:
        answer["metrics"] = timings(first.times)
        headers["server-timing"] = server_timing(first.times)

    def response() -> Response:
        choices: list[Any] = []
        for index, (delta, stream) in enumerate(zip(deltas, group.streams, strict=True)):
            choice = _choice(form, index, delta, stream, first=True, whole=True)
            choices.append(in_pieces(choice) if is_long else choice)
        return json_response(head | {"choices": choices} | answer, headers=headers)

    # The scores of a whole prompt would hold up all streams.
    return await asyncio.to_thread(response) if is_long else response()


def usage(body: Body, group: StreamGroup) -> dict[str, Any]:
    """Return OpenAI's `usage`; a prompt with several choices counts once, by its first."""
    firsts = [stream for stream in group.streams if stream.spec.params.choice == 0]
    num_prompt_tokens = sum(len(stream.spec.prompt_token_ids) for stream in firsts)
    num_output_tokens = sum(stream.num_tokens for stream in group.streams)
    if body.echoes_only():
        num_output_tokens = 0
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(stream.num_cached_tokens for stream in firsts)
        },
    }


async def _collect(request: Request, group: StreamGroup) -> list[Delta]:
    """Wait for all choices. Raises ClientGone when the client leaves first."""
    answer = asyncio.ensure_future(group.whole())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(
    group: StreamGroup, head: dict[str, Any], form: ChoiceForm
) -> AsyncIterator[sse.Chunks]:
    """Yield the chunks of what is new at a time, until all choices have ended.

    The first of a stream with scores goes alone: it may be megabytes.
    """
    body = form.body
    seen: set[int] = set()
    async for deltas, is_last in group.news():
        chunks: list[dict[str, Any]] = []
        for index, delta in deltas:
            stream, first = group.streams[index], index not in seen
            if first and _has_scores(stream):
                if chunks:
                    yield sse.Chunks(chunks, is_last=False)
                    chunks = []
                make = partial(_choice, form, index, delta, stream, first=True)
                choice = await asyncio.to_thread(_in_pieces, make)
            else:
                choice = _choice(form, index, delta, stream, first=first)
            chunk = head | {"choices": [choice]}
            if not seen:
                chunk |= form.of_all(stream)
            seen.add(index)
            if body.wants_usage_always():
                chunk["usage"] = usage(body, group)
            chunks.append(chunk)
        if is_last and (body.wants_usage() or body.return_metrics):
            last = head | {"choices": []}
            if body.wants_usage():
                last["usage"] = usage(body, group)
            if body.return_metrics:
                last["metrics"] = timings(group.streams[0].times)
            chunks.append(last)
        yield sse.Chunks(chunks, is_last)


def _text_events(
    group: StreamGroup, head: dict[str, Any], form: ChoiceForm
) -> Callable[[], bytes | None] | None:
    """Return what makes chunks of nothing but text; None if there are none in this answer."""
    body, stream = form.body, group.streams[0]
    if len(group.streams) > 1 or _has_scores(stream) or body.echoes_only():
        return None
    if body.return_token_ids or body.wants_usage_always():
        return None
    choice = _choice(form, 0, Delta(sse.TEXT, (), None), stream, first=False)
    return sse.text_events(head | {"choices": [choice]}, stream.take_text)


def _choice(
    form: ChoiceForm,
    index: int,
    delta: Delta,
    stream: RequestStream,
    *,
    first: bool,
    whole: bool = False,
) -> dict[str, Any]:
    """Return `choices[i]`, or what is new of it, with what every endpoint has."""
    body = form.body
    if body.echoes_only():
        ended = delta.finish_reason is not None
        delta = Delta("", (), FinishReason.LENGTH if ended else None)
    made = (
        form.whole(index, delta, stream) if whole else form.chunk(index, delta, stream, first=first)
    )
    choice = {"index": index, **made, "finish_reason": delta.finish_reason}
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    if first and body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(
            stream.spec.prompt_token_ids,
            stream.prompt_logprobs,
            body.prompt_logprobs,
            form.codec,
        )
    return choice


def _has_scores(stream: RequestStream) -> bool:
    params = stream.spec.params
    return params.logprobs is not None or params.prompt_logprobs is not None


def _in_pieces(make: Callable[[], dict[str, Any]]) -> Any:
    return in_pieces(make())
