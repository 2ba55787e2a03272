"""What takes turns computes one at a time, and too many who wait are told to come again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from serving.api.answers import ClientGone
from serving.api.turns import Turns
from serving.errors import TooManyRequests, Unavailable
from serving.metrics import Metrics
from tests.serving.scripted import Server, says


def asked_by(tenant="t", *, is_gone=False):
    async def is_disconnected():
        return is_gone

    state = SimpleNamespace(tenant=tenant, request_id="r")
    return SimpleNamespace(state=state, is_disconnected=is_disconnected)


@pytest.mark.parametrize("fails", [False, True])
def test_one_at_a_time_and_some_may_wait(fails):
    running = []

    async def ask(turns, request):
        async with turns.one(request):
            running.append(1)
            assert len(running) == 1
            await asyncio.sleep(0)
            running.pop()
            if fails:
                raise RuntimeError

    async def scenario():
        turns = Turns(Metrics("m"), 1.0, max_num_waiting=3)
        served = RuntimeError if fails else type(None)
        for expected in ([served] * 4 + [Unavailable] * 2, [served] * 4):
            asking = (ask(turns, asked_by()) for _ in expected)
            seen = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(one) for one in seen] == expected, "the second time places are free again"

    asyncio.run(scenario())


def test_a_tenant_has_its_share_and_who_left_has_no_turn():
    async def scenario():
        turns = Turns(Metrics("m"), 0.5, max_num_waiting=3)
        async with turns.one(asked_by("greedy")):
            second = asyncio.ensure_future(enter(turns, asked_by("greedy", is_gone=True)))
            await asyncio.sleep(0)
            with pytest.raises(TooManyRequests):
                await enter(turns, asked_by("greedy"))
            modest = asyncio.ensure_future(enter(turns, asked_by("modest")))
            await asyncio.sleep(0)
        with pytest.raises(ClientGone):
            await second
        await modest

    async def enter(turns, request):
        async with turns.one(request):
            pass

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
            counted = server.metric('hocket_request_rejections_total{model="m",reason="tokenizer"}')
            assert counted == found.count(503)

    asyncio.run(scenario())
