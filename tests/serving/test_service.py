"""What the server makes of an instance's reports: usage, metrics, failures, ends, its state."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.messages import Abort
from scheduler.types import FinishReason
from serving.api import admin
from tests.factories import make_spec
from tests.serving.scripted import MAX_MODEL_LEN, Script, Server, encode, says


def run(scenario, script, **settings):
    async def served():
        async with Server(script, **settings) as server:
            return await scenario(server)

    return asyncio.run(served())


# --- usage and metrics ---


def cached(spec):
    return Script(encode("ab"), num_cached_tokens=3 + spec.params.choice)


def test_usage_tells_the_cached_tokens_of_each_prompt_once():
    async def scenario(server):
        answer = (await server.complete(prompt=["Once", "upon a"], n=2)).json()
        assert answer["usage"] == {
            "prompt_tokens": 10,
            "completion_tokens": 8,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 6},
        }
        chunks = (await server.chat(stream=True, stream_options={"include_usage": True})).events()
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}

    run(scenario, cached)


def test_metrics_count_what_the_prefix_cache_gave():
    async def scenario(server):
        await server.complete(n=2)
        assert server.metric("hocket_prefix_cache_queries_total") == 8
        assert server.metric("hocket_prefix_cache_hits_total") == 7
        assert server.metric("hocket_queue_time_seconds_count") == 2
        assert server.metric("hocket_queue_time_seconds_sum") >= 1.0  # and the time at the router

    run(scenario, cached)


def test_a_stream_tells_where_its_time_went():
    async def scenario(server):
        group = server.driver.submit([make_spec("a", (1, 2), max_tokens=2)], ())
        (stream,) = group.streams
        assert stream.times.ttft_s is None
        await group.whole()
        times = stream.times
        assert times.num_tokens == 2
        assert 0.5 <= times.queue_s < times.queue_s + times.ttft_s
        assert 0 < times.ttft_s < times.ttft_s + times.decode_s <= times.e2e_s
        assert times.tpot_s == times.decode_s

    run(scenario, says("ab"))


# --- a request that fails in the model ---


def fails_for_x(spec):
    failing = spec.prompt_token_ids == tuple(encode("x"))
    return Script(encode("abcdefgh"), error="logits are not finite" if failing else None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_told_why_and_its_neighbour_goes_on(stream):
    async def scenario(server):
        failed, neighbour = await asyncio.gather(
            server.complete(prompt="x", max_tokens=3, stream=stream), server.complete(prompt="y")
        )
        if stream:
            *chunks, last = failed.events()
            assert (failed.status, "".join(c["choices"][0]["text"] for c in chunks)) == (200, "abc")
            error = last["error"]
        else:
            assert failed.status == 500
            error = failed.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "generation_failed")
        assert error["message"] == "this request could not be computed; the server's log says why"
        assert neighbour.json()["choices"][0]["text"] == "abcdefgh"
        assert (await server.complete(prompt="z")).status == 200
        assert server.driver.ready
        assert (
            server.metric('hocket_requests_total{endpoint="completions",model="m",outcome="error"}')
            == 1
        )

    run(scenario, fails_for_x)


def test_the_other_choices_of_a_failed_request_are_ended():
    def script(spec):
        return Script(encode("a" * 60)) if spec.params.choice == 0 else Script([], error="no")

    async def scenario(server):
        assert (await server.complete(n=2, max_tokens=60)).status == 500
        (abort,) = [c for c in server.handle.commands if isinstance(c, Abort)]
        assert abort.num_output_tokens is None

    run(scenario, script)


def test_a_long_cause_is_cut():
    async def scenario(server):
        answer = await server.complete()
        assert answer.status == 500
        assert len(answer.text) < 600

    run(scenario, says("a", error="x" * 100_000))


# --- the end at a stop string ---


@pytest.mark.parametrize(
    ("text", "stop", "counted"), [("abcdefgh", "cd", 4), ("abcdefgh", ["h"], 8), ("abc", "a", 1)]
)
def test_the_instance_is_told_how_many_tokens_count(text, stop, counted):
    async def scenario(server):
        answer = (await server.complete(stop=stop)).json()
        assert answer["usage"]["completion_tokens"] == counted
        assert answer["choices"][0]["finish_reason"] == FinishReason.STOP
        (abort,) = [c for c in server.handle.commands if isinstance(c, Abort)]
        assert abort.num_output_tokens == counted

    run(scenario, says(text))


# --- /debug/state ---


def test_the_state_tells_where_requests_stand_and_nothing_of_what_they_say():
    async def scenario(server):
        task = asyncio.ensure_future(server.complete(prompt="secret?", max_tokens=50))
        while not server.metric("hocket_generation_tokens_total"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        answer = await server.admin("GET", "/debug/state")
        assert answer.status == 200
        state = answer.json()
        assert state["instances"] == {"instance-0": {"num_requests": 1}}
        ((request_id, stream),) = state["streams"].items()
        assert stream["num_prompt_tokens"] == 7
        assert stream["num_output_tokens"] >= 1
        assert stream["max_tokens"] == 50
        assert state["cluster"]["assigned"] == {request_id: "instance-0"}
        assert not state["cluster"]["draining"]
        assert "secret" not in answer.text
        assert "hush" not in answer.text
        assert str(encode("secret?"))[1:-1].replace(" ", "") not in answer.text
        await task
        assert json.loads((await server.admin("GET", "/debug/state")).text)["streams"] == {}

    run(scenario, says("hush" * 12))


def test_an_instance_that_does_not_answer_is_503(monkeypatch):
    monkeypatch.setattr(admin, "_TIMEOUT_S", 0.01)

    async def scenario(server):
        server.handle.answers_inspections = False
        answer = await server.admin("GET", "/debug/state")
        assert answer.status == 503
        assert answer.json()["error"]["code"] == "no_answer"
        assert "instance-0" in answer.json()["error"]["message"]
        server.handle.answers_inspections = True
        assert (await server.admin("GET", "/debug/state")).status == 200

    run(scenario, says("a"))


def test_a_lost_instance_keeps_nobody_waiting():
    async def scenario(server):
        server.handle.answers_inspections = False
        waiting = asyncio.ensure_future(server.admin("GET", "/debug/state"))
        await server.handle.was_inspected.wait()
        server.handle.fail()
        assert (await waiting).json()["instances"] == {"instance-0": None}
        state = (await server.admin("GET", "/debug/state")).json()
        assert state["instances"] == {"instance-0": None}

    run(scenario, says("a"))


# --- the window ---


def test_an_echo_needs_room_for_one_token():
    async def scenario(server):
        fits = await server.complete(prompt="x" * (MAX_MODEL_LEN - 1), echo=True, max_tokens=0)
        assert fits.status == 200
        full = await server.complete(prompt="x" * MAX_MODEL_LEN, echo=True, max_tokens=0)
        assert full.json()["error"]["code"] == "context_length_exceeded"

    run(scenario, says("a"))
