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


class ChoiceForm(Protocol):
    """What one endpoint puts into `choices[i]`, beside what every endpoint does."""

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
    service: Service,
    request: Request,
    body: Body,
    group: StreamGroup,
    head: dict[str, Any],
    form: ChoiceForm,
) -> Response:
    """Answer as the body asks, in events or whole. Raises RequestError, ClientGone."""
    deadline_s = math.inf
    if body.timeout is not None:  # tokenizing has taken some of it
        deadline_s = request.state.arrived_at_s + body.timeout
    open_answer = service.open_answer(group, pass_of(request), deadline_s)
    if body.stream:
        return sse.event_stream(_chunks(service, body, group, head, form), open_answer)
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
            choice = _choice(service, body, index, delta, stream, form.whole, first=True)
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
    service: Service, body: Body, group: StreamGroup, head: dict[str, Any], form: ChoiceForm
) -> AsyncIterator[dict[str, Any] | None]:
    """Yield chunk bodies as tokens arrive, None for a sign of life."""
    seen: set[int] = set()
    async for news in group.deltas():
        if news is None:
            yield None
            continue
        index, delta = news
        stream, first = group.streams[index], index not in seen
        seen.add(index)
        chunk = partial(form.chunk, first=first)
        make = partial(_choice, service, body, index, delta, stream, chunk, first=first)
        is_long = first and _has_scores(stream)
        choice = await asyncio.to_thread(_in_pieces, make) if is_long else make()
        whole = head | {"choices": [choice]}
        if len(seen) == 1 and first:
            whole |= form.of_all(stream)
        if body.wants_usage_always():
            whole["usage"] = usage(body, group)
        yield whole
    if body.wants_usage() or body.return_metrics:
        last = head | {"choices": []}
        if body.wants_usage():
            last["usage"] = usage(body, group)
        if body.return_metrics:
            last["metrics"] = timings(group.streams[0].times)
        yield last


def _choice(
    service: Service,
    body: Body,
    index: int,
    delta: Delta,
    stream: RequestStream,
    form: Callable[[int, Delta, RequestStream], dict[str, Any]],
    *,
    first: bool,
) -> dict[str, Any]:
    """Return `choices[i]` with what every endpoint has."""
    if body.echoes_only():
        ended = delta.finish_reason is not None
        delta = Delta("", (), FinishReason.LENGTH if ended else None)
    choice = {"index": index, **form(index, delta, stream), "finish_reason": delta.finish_reason}
    if body.return_token_ids:
        choice["token_ids"] = list(delta.token_ids)
    if first and body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(
            stream.spec.prompt_token_ids,
            stream.prompt_logprobs,
            body.prompt_logprobs,
            service.codec,
        )
    return choice


def _has_scores(stream: RequestStream) -> bool:
    params = stream.spec.params
    return params.logprobs is not None or params.prompt_logprobs is not None


def _in_pieces(make: Callable[[], dict[str, Any]]) -> Any:
    return in_pieces(make())
