"""What is new of several streams comes together, and their end with the last of it."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.types import FinishReason
from serving.cluster.streams import RequestStream, StreamGroup
from serving.errors import GenerationFailed
from tests.factories import make_spec
from tests.serving.scripted import CODEC, Server, encode, says


def make_group(*names):
    group = StreamGroup()
    group.streams += [RequestStream(make_spec(name), CODEC, [], group) for name in names]
    return group


def test_the_tokens_of_a_step_come_together_and_the_end_is_told_with_the_last():
    async def scenario():
        group = make_group("a", "b")
        first, second = group.streams
        news = group.news()
        for stream, token_id in zip(group.streams, encode("xy"), strict=True):
            stream.deliver(0, token_id)
        group.tell()
        deltas, is_last = await anext(news)
        assert [(index, delta.text) for index, delta in deltas] == [(0, "x"), (1, "y")]
        assert not is_last
        first.finish(FinishReason.LENGTH)
        second.deliver(1, encode("z")[0])
        second.finish(FinishReason.STOP)
        deltas, is_last = await anext(news)
        told = [(index, delta.text, delta.finish_reason) for index, delta in deltas]
        assert told == [(0, "", FinishReason.LENGTH), (1, "z", FinishReason.STOP)]
        assert is_last
        assert [rest async for rest in news] == []

    asyncio.run(scenario())


def test_a_nudge_brings_nothing_unless_there_is_something():
    async def scenario():
        group = make_group("a")
        news = group.news()
        group.nudge()
        assert await anext(news) == ([], False)
        group.nudge()
        group.streams[0].deliver(0, encode("x")[0])
        group.tell()
        deltas, _ = await anext(news)
        assert deltas, "that is sign enough"
        group.wake.set()
        late = asyncio.ensure_future(anext(news))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not late.done(), "the nudge before is not answered once more"
        group.streams[0].finish(FinishReason.STOP)
        assert (await late).is_last

    asyncio.run(scenario())


def test_an_error_comes_behind_what_came_before_it():
    async def scenario():
        group = make_group("a", "b")
        news = group.news()
        group.streams[1].deliver(0, encode("y")[0])
        group.streams[0].fail(GenerationFailed())
        deltas, is_last = await anext(news)
        assert [index for index, _ in deltas] == [1]
        assert not is_last
        with pytest.raises(GenerationFailed):
            await anext(news)

    asyncio.run(scenario())


def test_an_error_is_not_put_off_by_a_nudge():
    """Else a stream would begin, for a client that could have had the status of the error."""

    async def scenario():
        group = make_group("a")
        group.nudge()
        group.streams[0].fail(GenerationFailed())
        with pytest.raises(GenerationFailed):
            await anext(group.news())

    asyncio.run(scenario())


def test_what_may_be_megabytes_goes_alone():
    async def scenario():
        async with Server(says("abc")) as server:
            answer = await server.complete(
                stream=True, n=3, echo=True, logprobs=1, prompt="a long one", max_tokens=2
            )
            firsts = [part for part in answer.parts if '"text":"a long one' in part]
            assert len(firsts) == 3
            assert all(part.count("a long one") == 1 for part in firsts)

    asyncio.run(scenario())


def test_the_last_token_the_usage_and_the_end_of_a_stream_are_one_write():
    async def scenario():
        async with Server(says("abc")) as server:
            options = {"include_usage": True}
            answer = await server.complete(stream=True, stream_options=options, max_tokens=3)
            *_, last = answer.parts
            assert '"finish_reason":"length"' in last
            assert '"usage":{' in last
            assert last.endswith("data: [DONE]\n\n")

    asyncio.run(scenario())
