"""What takes turns computes one at a time, and too many who wait are told to come again."""

from __future__ import annotations

import asyncio

import pytest

from serving.api.turns import Turns
from tests.serving.scripted import Server, says


async def statuses(app, number):
    """Ask so many times at once; return what each was answered, None where nothing was."""
    seen = [[] for _ in range(number)]

    async def ask(messages):
        async def send(message):
            messages.append(message)

        await app({"type": "http"}, None, send)

    await asyncio.gather(*map(ask, seen), return_exceptions=True)
    return [messages[0]["status"] if messages else None for messages in seen]


@pytest.mark.parametrize("served", [200, None])
def test_one_at_a_time_and_some_may_wait(served):
    running = []

    async def app(scope, receive, send):
        running.append(1)
        assert len(running) == 1
        await asyncio.sleep(0)
        running.pop()
        if served is None:
            raise RuntimeError
        await send({"type": "http.response.start", "status": served, "headers": []})

    async def scenario():
        turns = Turns(max_num_waiting=3).of(app)
        assert await statuses(turns, 6) == [served] * 4 + [503] * 2
        assert await statuses(turns, 4) == [served] * 4, "their places are free again"

    asyncio.run(scenario())


def test_the_tokenizer_takes_turns():
    async def scenario():
        async with Server(says("a")) as server:
            answers = await asyncio.gather(*(server.tokenize("abc") for _ in range(80)))
            found = [answer.status for answer in answers]
            assert set(found) == {200, 503}
            assert found.count(200) >= 65
            refused = answers[found.index(503)]
            assert int(refused.headers["retry-after"]) >= 1

    asyncio.run(scenario())
