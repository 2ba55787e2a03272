"""From token streams to answers, whole or in chunks: what completions and chat have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from serving.cluster.driver import ClusterDriver
from serving.cluster.streams import Delta, StreamGroup

# Makes `choices[i]` of a chunk, given the index, what is new, and whether it is the first.
ChunkChoice = Callable[[int, Delta, bool], dict[str, Any]]


@dataclass(slots=True)
class Collected:
    """One choice as a whole."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


async def collect(request: Request, driver: ClusterDriver, group: StreamGroup) -> list[Collected]:
    """Wait for all choices. Raises ClientGone, after aborting, when the client leaves first."""
    answer = asyncio.ensure_future(_gather(group))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        driver.cancel(group)
        for task in (answer, gone):
            task.cancel()


async def chunks(
    group: StreamGroup, head: dict[str, Any], choice: ChunkChoice, *, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield chunk bodies as tokens arrive."""
    seen: set[int] = set()
    async for index, delta in group.deltas():
        yield head | {"choices": [choice(index, delta, index not in seen)]}
        seen.add(index)
    if include_usage:
        yield head | {"choices": [], "usage": usage(group)}


def usage(group: StreamGroup) -> dict[str, int]:
    """Return OpenAI's `usage`; a prompt with several choices counts once."""
    num_prompt_tokens = sum(
        len(stream.spec.prompt_token_ids)
        for stream in group.streams
        if stream.spec.params.choice == 0
    )
    num_output_tokens = sum(stream.num_tokens for stream in group.streams)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }


async def _gather(group: StreamGroup) -> list[Collected]:
    choices = [Collected() for _ in group.streams]
    async for index, delta in group.deltas():
        choice = choices[index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.finish_reason = delta.finish_reason
    return choices


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
