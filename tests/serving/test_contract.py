"""What clients of vLLM and OpenAI rely on beyond the answers: routes, fields, events, errors."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest

from tests.serving.scripted import CODEC, MAX_MODEL_LEN, Script, Server, encode, says

USER = {"role": "user"}
EOS = CODEC.eos_token_ids[0]


def run(scenario, script=None, **settings):
    async def served():
        async with Server(script or says("abcd"), **settings) as server:
            return await scenario(server)

    return asyncio.run(served())


def post(path, body, script=None):
    return run(lambda server: server._post(path, body), script)


# --- the tokenizer's routes ---


def test_a_prompt_is_tokenized_and_back():
    body = {"prompt": "hi é<|im_end|>", "return_token_strs": True}
    answer = post("/tokenize", body).json()
    assert answer == {
        "count": 6,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": CODEC.encode("hi é<|im_end|>", add_special_tokens=True),
        "token_strs": ["h", "i", "Ġ", "Ã", "©", "<|im_end|>"],
    }
    back = post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "hi é<|im_end|>"}


def test_messages_are_tokenized_as_a_chat_would_see_them():
    async def scenario(server):
        messages = [{"role": "user", "content": "hi <|im_end|>"}]
        answer = (await server._post("/tokenize", {"messages": messages})).json()
        await server.chat(messages=messages)
        assert tuple(answer["tokens"]) == server.last_spec.prompt_token_ids
        assert answer["token_strs"] is None
        body = {"messages": messages, "continue_final_message": True}
        shorter = (await server._post("/tokenize", body)).json()
        assert answer["tokens"][: shorter["count"]] == shorter["tokens"]
        assert 0 < shorter["count"] < answer["count"]

    run(scenario)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [CODEC.vocab_size]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_the_tokenizer_refuses(path, body, param):
    answer = post(path, body)
    assert answer.status == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


def test_monitors_and_clients_are_told_who_this_is():
    async def scenario(server):
        info = (await server.get("/tokenizer_info")).json()
        assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", None)
        assert info["chat_template"] == CODEC.template
        (card,) = (await server.get("/v1/models")).json()["data"]
        names = ("max_model_len", "context_length", "max_input_tokens", "max_output_tokens")
        assert [card[name] for name in names] == [MAX_MODEL_LEN] * 4
        assert (await server.get("/version")).json()["version"]
        assert (await server.get("/ping")).status == 200
        assert (await server._post("/ping", {})).status == 200
        assert (await server.get("/load")).json() == {"server_load": 0}
        asked = asyncio.ensure_future(server.complete(n=3))
        await server.handle.was_submitted.wait()
        assert (await server.get("/load")).json() == {"server_load": 3}
        await asked

    run(scenario)


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/metrics", "/metrics/vllm"])
def test_load_balancers_may_ask_with_head(path):
    async def scenario(server):
        get, head = await server.get(path), await server._call("HEAD", path, b"")
        assert head.status == get.status == 200
        assert head.headers.get("content-type") == get.headers.get("content-type")

    run(scenario)


def test_the_schema_tells_bodies_answers_and_errors_and_the_docs_load_nothing():
    async def scenario(server):
        spec = (await server.get("/openapi.json")).json()
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            operation = spec["paths"][path]["post"]
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
            assert operation["requestBody"]["content"].keys() == {"application/json"}
            refused = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert refused == {"$ref": "#/components/schemas/ErrorAnswer"}
        answers = spec["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
        assert answers.keys() == {"application/json", "text/event-stream"}
        page = (await server.get("/docs")).text
        assert "include_stop_str_in_output" in page
        assert "http" not in page.replace("http_", "").partition("<style>")[2]
        assert "<script" not in page

    run(scenario)


# --- fields ---


def says_ids(*ids):
    return lambda spec: Script(list(ids))


def test_a_stop_string_is_shown_on_demand():
    async def scenario(server):
        for shown, text in ((None, "a"), (False, "a"), (True, "abc")):
            body = {"stop": ["bc"], "include_stop_str_in_output": shown}
            assert (await server.complete(**body)).json()["choices"][0]["text"] == text
            chunks = (await server.complete(**body, stream=True)).events()
            assert "".join(c["choices"][0]["text"] for c in chunks) == text

    run(scenario, says("abcd"))


def test_special_tokens_are_shown_on_demand():
    start = CODEC.encode("<|im_start|>", add_special_tokens=False)[0]

    async def scenario(server):
        for body, text in (
            ({}, "a"),
            ({"skip_special_tokens": False}, "<|im_start|>a"),
            ({"skip_special_tokens": False, "include_stop_str_in_output": True},
             "<|im_start|>a<|im_end|>"),
            ({"skip_special_tokens": False, "ignore_eos": True}, "<|im_start|>a<|im_end|>b"),
        ):  # fmt: skip
            choice = (await server.complete(**body)).json()["choices"][0]
            assert choice["text"] == text, body

    run(scenario, says_ids(start, *encode("a"), EOS, *encode("b")))


def test_a_prompt_is_cut_from_the_left():
    async def scenario(server):
        for limit, kept in ((3, "abc"), (6, "xyzabc"), (9, "xyzabc")):
            body = {"truncate_prompt_tokens": limit, "echo": True, "max_tokens": 1}
            answer = (await server.complete(prompt="xyzabc", **body)).json()
            assert answer["choices"][0]["text"] == kept + "a"
            assert answer["usage"]["prompt_tokens"] == len(kept)
        long = {"prompt": "ab" * 500, "max_tokens": 4, "truncate_prompt_tokens": -1}
        assert (await server.complete(**long)).json()["usage"]["total_tokens"] == MAX_MODEL_LEN
        default = {"prompt": "ab" * 500, "max_tokens": None, "truncate_prompt_tokens": -1}
        usage = (await server.complete(**default)).json()["usage"]
        assert usage["prompt_tokens"] == MAX_MODEL_LEN - 16
        for max_tokens in (MAX_MODEL_LEN, 10_000):  # no prompt leaves room for so many
            body = {"max_tokens": max_tokens, "truncate_prompt_tokens": -1}
            assert (await server.complete(**body)).json()["usage"]["prompt_tokens"] == 4
            usage = (await server.complete(prompt="ab" * 500, **body)).json()["usage"]
            assert usage["prompt_tokens"] == MAX_MODEL_LEN - 1
        message = [{"role": "user", "content": "ab" * 500}]
        cut = await server.chat(messages=message, truncate_prompt_tokens=10)
        assert cut.json()["usage"]["prompt_tokens"] == 10

    run(scenario)


def test_a_clients_id_is_the_answers_id_and_the_headers():
    async def scenario(server):
        first = await server.complete(request_id="mine-1")
        again = await server.chat(request_id="mine-1", stream=True)
        assert first.json()["id"] == "cmpl-mine-1"
        assert {chunk["id"] for chunk in again.events()} == {"chatcmpl-mine-1"}
        assert first.headers["x-request-id"] == again.headers["x-request-id"] == "mine-1"
        ids = [str(request_id) for request_id in server.handle.specs]
        assert len(set(ids)) == 2
        assert not any("mine" in request_id for request_id in ids)

    run(scenario)


def test_token_ids_are_returned_with_those_of_the_prompt():
    async def scenario(server):
        body = {"return_token_ids": True, "prompt": ["ab", "c"]}
        first, second = (await server.complete(**body)).json()["choices"]
        assert (first["prompt_token_ids"], second["prompt_token_ids"]) == (
            encode("ab"),
            encode("c"),
        )
        assert first["token_ids"] == encode("abcd")
        chunks = (await server.chat(return_token_ids=True, stream=True)).events()
        assert [len(c.get("prompt_token_ids", ())) for c in chunks] == [21, 0, 0, 0]
        assert [c["choices"][0]["token_ids"] for c in chunks] == [[i] for i in encode("abcd")]
        whole = (await server.chat(return_token_ids=True)).json()
        assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"]

    run(scenario)


def test_times_are_told_on_demand():
    async def scenario(server):
        answer = await server.complete(return_metrics=True)
        metrics = answer.json()["metrics"]
        assert (
            500.0 <= metrics["queue_time_ms"] < 600.0
        )  # of the instance, and a little of the router
        assert metrics["generation_time_ms"] > 0
        assert metrics["mean_itl_ms"] == pytest.approx(metrics["generation_time_ms"] / 3, abs=0.01)
        assert re.match(
            r"intake;dur=[0-9.]*[1-9][0-9.]*, queue;dur=5[0-9.]+, prefill;dur=",
            answer.headers["server-timing"],
        )
        *_, last = (await server.chat(return_metrics=True, stream=True)).events()
        assert last["metrics"].keys() == metrics.keys()
        assert "usage" not in last, "nobody asked for it"
        plain = await server.complete()
        assert "metrics" not in plain.json()
        assert "server-timing" not in plain.headers

    run(scenario)


def test_the_token_that_an_echo_alone_computes_counts_for_nothing():
    async def scenario(server):
        await server.complete(prompt=["Hey", "Yo"], echo=True, max_tokens=0, logprobs=1)
        assert server.metric("hocket_prompt_tokens_total") == 5
        assert server.metric("hocket_generation_tokens_total") == 0
        assert server.metric("hocket_request_generation_tokens_sum") == 0
        assert (
            server.metric(
                'hocket_requests_total{endpoint="completions",model="m",outcome="length"}'
            )
            == 2
        )
        await server.complete(max_tokens=1)
        assert server.metric("hocket_generation_tokens_total") == 1

    run(scenario)


def test_a_timeout_ends_the_request_everywhere():
    slow = says("abcd" * 100)

    async def scenario(server):
        body = {"timeout": 0.02, "max_tokens": 50}
        answer = await server.complete(n=2, **body)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (504, "request_timeout", "timeout")
        assert answer.headers["x-should-retry"] == "false"
        *chunks, last = (await server.complete(stream=True, **body)).events()
        assert last == {"error": error}
        assert chunks
        assert (
            server.metric(
                'hocket_requests_total{endpoint="completions",model="m",outcome="timeout"}'
            )
            == 3
        )
        assert (await server.get("/load")).json() == {"server_load": 0}
        assert (await server.complete(timeout=60, max_tokens=2)).status == 200

    run(scenario, slow)


def test_fields_without_effect_are_accepted_and_unknown_ones_counted(caplog):
    async def scenario(server):
        known = {
            "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False,
            "parallel_tool_calls": True, "best_of": 1, "tools": [], "tool_choice": "auto",
            "response_format": {"type": "text"}, "suffix": None, "session_id": "s",
        }  # fmt: skip
        assert (await server.chat(**known)).status == 200
        assert server.metric("hocket_unknown_fields_total") == 0
        for _ in range(2):
            await server.complete(brand_new=1, **{"not a name": 2})
        for number in range(60):
            await server.complete(**{f"field_{number}": 1})
        page = server.metrics.render().decode()
        assert 'hocket_unknown_fields_total{field="brand_new",model="m"} 2.0' in page
        assert 'field="other"' in page
        assert page.count("hocket_unknown_fields_total{") == 51
        assert server.metric("hocket_unknown_fields_total") == 64

    with caplog.at_level(logging.WARNING):
        run(scenario)
    told = [record.getMessage() for record in caplog.records]
    assert sum("brand_new" in line for line in told) == 1
    assert len(told) == 51


def test_messages_may_be_in_parts_and_a_tools():
    async def scenario(server):
        parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
        await server.chat(messages=[{"role": "user", "content": parts}])
        in_parts = server.last_spec.prompt_token_ids
        await server.chat()
        assert server.last_spec.prompt_token_ids == in_parts
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        answer = await server.chat(
            messages=[
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "42", "tool_call_id": "c"},
            ]
        )
        assert answer.status == 200, answer.text
        prompt = CODEC.decode(list(server.last_spec.prompt_token_ids), skip_special_tokens=False)
        assert "<|im_start|>tool\n42<|im_end|>" in prompt
        bad = await server.chat(messages=[{"role": "wizard", "content": "x"}])
        assert (bad.status, bad.json()["error"]["param"]) == (400, "messages.0.role")
        bad = await server.chat(chat_template_kwargs={"tokenize": True})
        assert (bad.status, bad.json()["error"]["param"]) == (400, "chat_template_kwargs")

    run(scenario)


# --- events ---


def test_usage_comes_with_every_chunk_on_demand():
    async def scenario(server):
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = (await server.complete(stream=True, stream_options=options)).events()
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 4]
        assert all(c["usage"]["prompt_tokens"] == 4 for c in chunks)
        assert [len(c["choices"]) for c in chunks] == [1, 1, 1, 1, 0]

    run(scenario)


def test_chunks_say_only_what_is_new():
    async def scenario(server):
        for call in (server.complete, server.chat):
            chunks = (await call(stream=True, n=2)).events()
            heads = {(c["id"], c["object"], c["created"], c["system_fingerprint"]) for c in chunks}
            assert len(heads) == 1
            assert all("logprobs" not in c["choices"][0] and "usage" not in c for c in chunks)
            for index in (0, 1):
                own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
                assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
                if call == server.chat:
                    assert own[0]["delta"] == {"role": "assistant", "content": "a"}
                    assert all(c["delta"].keys() == {"content"} for c in own[1:])

    run(scenario)


def test_a_fault_of_the_server_ends_a_stream_with_an_error(monkeypatch, caplog):
    async def scenario(server):
        monkeypatch.setattr("serving.api.answers.usage", lambda *_: 1 / 0)
        options = {"include_usage": True}
        *_, last = (await server.complete(stream=True, stream_options=options)).events()
        assert last["error"]["code"] == "internal_error"
        assert "division" not in json.dumps(last)

    run(scenario)
    assert "ZeroDivisionError" in caplog.text


# --- errors ---


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [[1], [-1]]}, "prompt"),
        ("completions", {"stop": ["a"] * 5}, "stop"),
        ("completions", {"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ("completions", {"n": "2"}, "n"),
        ("completions", {"max_tokens": "16"}, "max_tokens"),
        ("chat", {"messages": [USER | {"content": [{"type": "text"}]}]}, "messages.0.content"),
        ("chat", {"messages": [USER | {"content": 3}]}, "messages.0.content"),
        ("chat", {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
    ],
)  # fmt: skip
def test_param_is_the_clients_path_and_not_pydantics(path, body, param):
    async def scenario(server):
        return await (server.chat if path == "chat" else server.complete)(**body)

    answer = run(scenario)
    error = answer.json()["error"]
    assert answer.status == 400
    assert error["param"].startswith(param)
    branches = {"str", "list", "int", "bool", "Stop", "ContentPart"}
    assert not set(error["param"].split(".")) & branches
    assert len(answer.text) < 1500


@pytest.mark.parametrize(
    ("declared", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/jsonp", 415),
        ("", 415),
        (None, 415),
    ],
)
def test_bodies_must_be_declared_as_json(declared, status):
    async def scenario(server):
        headers = {} if declared is None else {"content-type": declared}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            chat = {"messages": [{"role": "user", "content": "x"}]}
            body = chat if path == "/v1/chat/completions" else {"prompt": "x"}
            body = {"tokens": [1]} if path == "/detokenize" else body
            answer = await server._call("POST", path, json.dumps(body).encode(), headers)
            assert answer.status == status, answer.text
            if status == 415:
                assert answer.json()["error"]["code"] == "unsupported_media_type"

    run(scenario)


def test_the_words_that_litellm_looks_for():
    answer = run(lambda server: server.complete(prompt="x" * MAX_MODEL_LEN))
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (400, "context_length_exceeded")
    assert "this model's maximum context length is" in error["message"].lower()
    clamped = run(lambda server: server.complete(prompt="x" * 62, max_tokens=9999)).json()
    assert clamped["usage"]["completion_tokens"] == 2
    assert clamped["choices"][0]["finish_reason"] == "length"
