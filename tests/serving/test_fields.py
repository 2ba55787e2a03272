"""Every field of a request: what it becomes, and which values are refused by name."""

from __future__ import annotations

import asyncio
import logging

import pytest
from pydantic import ValidationError

from serving.api.schemas import ChatRequest, CompletionRequest, TokenizeRequest
from tests.serving.scripted import MAX_MODEL_LEN, Server, encode, says

USER = {"role": "user", "content": "x"}
MANY_LISTS: dict[str, object] = {str(number): [] for number in range(50)}


def ask(calls, script=None, **settings):
    """Make the calls one after the other; return their answers and the last request's spec."""

    async def scenario():
        async with Server(script or says("abcd"), **settings) as server:
            answers = [
                await (server.chat if path == "chat" else server.complete)(**body)
                for path, body in calls
            ]
            return answers, server.last_spec if server.handle.specs else None

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ({"presence_penalty": -2}, "presence_penalty", -2.0),
        ({"frequency_penalty": 2}, "frequency_penalty", 2.0),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"logit_bias": {"7": -100, "3": 5.5}}, "logit_bias", ((3, 5.5), (7, -100.0))),
        ({"logit_bias": {"007": 1}}, "logit_bias", ((7, 1.0),)),
        ({"allowed_token_ids": [9, 4, 9]}, "allowed_token_ids", (4, 9)),
        ({"min_tokens": 4, "max_tokens": 4}, "min_tokens", 4),
        ({"bad_words": ["ab"]}, "bad_token_ids", (tuple(encode("ab")),)),
        ({"bad_words": [" b", "b", " "]}, "bad_token_ids", (tuple(encode("b")), (0,))),
        ({"prompt_logprobs": 20}, "prompt_logprobs", 20),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat"])
def test_a_value_reaches_the_sampler(path, body, name, value):
    (answer,), spec = ask([(path, body)])
    assert answer.status == 200, answer.text
    assert getattr(spec.params, name) == value


@pytest.mark.parametrize(
    ("path", "body", "logprobs", "prompt_logprobs"),
    [
        ("completions", {"logprobs": 0}, 0, None),
        ("completions", {"logprobs": 20}, 20, None),
        ("completions", {"logprobs": 5, "echo": True}, 5, 5),
        ("completions", {"logprobs": 5, "echo": True, "prompt_logprobs": 7}, 5, 7),
        ("completions", {"echo": True}, None, None),
        ("chat", {"logprobs": True}, 0, None),
        ("chat", {"logprobs": True, "top_logprobs": 20}, 20, None),
        ("chat", {"logprobs": False, "top_logprobs": 0}, None, None),
    ],
)
def test_scores_are_asked_for_as_needed(path, body, logprobs, prompt_logprobs):
    (answer,), spec = ask([(path, body)])
    assert answer.status == 200, answer.text
    assert (spec.params.logprobs, spec.params.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_null_means_default():
    names = (
        "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words",
        "min_tokens", "allowed_token_ids", "priority", "cache_salt", "logprobs",
        "prompt_logprobs", "top_logprobs", "echo",
    )  # fmt: skip
    for path in ("completions", "chat"):
        answers, spec = ask([(path, {"seed": 1}), (path, {"seed": 1} | dict.fromkeys(names))])
        assert [answer.status for answer in answers] == [200, 200]
        assert spec.params.repetition_penalty == 1.0
        assert spec.priority == 0
        whole, nulls = (answer.json()["choices"] for answer in answers)
        assert whole == nulls


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {" 1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [[3, 1]]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 258]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"bad_words": ["x" * 129]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": MAX_MODEL_LEN, "max_tokens": 10**6}, "min_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"priority": 1}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"cache_salt": 3}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"bad_words": ["\ud800"]}, "bad_words"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"request_id": "two\nlines"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
        ({"watermarking": True}, "watermarking"),
        ({"return_token_offsets": True}, "return_token_offsets"),
        ({"return_prompt_text": True}, "return_prompt_text"),
        ({"mm_payload": {"images": ["x"]}}, "mm_payload"),
        ({"regex": "a+"}, "regex"),
        ({"ebnf": "root ::= x"}, "ebnf"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"stop_regex": ["a+"]}, "stop_regex"),
        ({"no_stop_trim": True}, "no_stop_trim"),
        ({"mirostat": 2}, "mirostat"),
        ({"n_predict": 5}, "n_predict"),
        ({"allowed_token_ids": encode("xy"), "bad_words": ["y", "x", "z"]}, "bad_words"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options"),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat"])
def test_a_bad_value_is_400_and_names_the_field(path, body, param):
    check_refused(path, body, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": -1}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"top_logprobs": 2}, "top_logprobs"),
        ("completions", {"echo": 1}, "echo"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"max_tokens": 0, "echo": False}, "max_tokens"),
        ("completions", {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ("completions", {"min_tokens": 17}, "min_tokens"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"logprobs": 5}, "logprobs"),
        ("chat", {"top_logprobs": 5}, "top_logprobs"),
        ("chat", {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"echo": True}, "echo"),
        ("chat", {"prompt": "x"}, "prompt"),
        ("completions", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("completions", {"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)
def test_what_one_endpoint_refuses(path, body, param):
    check_refused(path, body, param)


def check_refused(path, body, param):
    (answer,), spec = ask([(path, body)])
    assert (answer.status, spec) == (400, None), answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param
    assert param in error["message"]
    assert len(answer.text) < 2000


def test_what_is_banned_in_part_leaves_the_rest():
    body = {"allowed_token_ids": encode("xy"), "bad_words": ["x", "yx"]}
    (answer,), spec = ask([("completions", body)])
    assert answer.status == 200, answer.text
    assert spec.params.allowed_token_ids == tuple(sorted(encode("xy")))


def test_how_an_answer_is_delivered_may_be_left_to_the_server():
    (answer,), _ = ask([("chat", {"stream_interval": 5})])
    assert answer.status == 200, answer.text


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": [USER], "chat_template_kwargs": MANY_LISTS}),
        (TokenizeRequest, {"messages": [USER], "chat_template_kwargs": MANY_LISTS}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(1025)}}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * 99}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["x"] * 99}),
        (CompletionRequest, {"prompt": "x", "bad_words": [1] * 99}),
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": ["x"] * 99}),
        (CompletionRequest, {"prompt": [[1]] * 99 + ["x"]}),
        (ChatRequest, {"messages": [1] * 99}),
        (ChatRequest, {"messages": [USER | {"content": [1] * 99}]}),
        (ChatRequest, {"messages": [USER | {"tool_calls": [1] * 99}]}),
    ],
)
def test_a_container_makes_few_errors_however_much_is_in_it(model, body):
    """They are made on the event loop, and every stream waits for it."""
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() <= 5


# --- what is inside of messages ---


def in_message(**fields):
    return {"messages": [USER, USER | fields]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *(
            (in_message(**{name: value}), f"messages.1.{name}")
            for name, value in (
                ("function_call", {"name": "f", "arguments": "{}"}),
                ("audio", {"id": "a"}),
                ("reasoning_content", "hm"),
                ("reasoning", "hm"),
                ("prefix", True),
                ("partial", True),
                ("refusal", "no"),
                ("images", ["x"]),
            )
        ),
        (
            in_message(content=[{"type": "text", "text": "x", "image_url": {"url": "x"}}]),
            "messages.1.content.0.image_url",
        ),
    ],
)
def test_a_field_of_a_message_that_would_change_the_conversation_is_refused(body, param):
    async def scenario():
        async with Server(says("a")) as server:
            return await server.chat(**body), await server._post("/tokenize", body)

    for answer in asyncio.run(scenario()):
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == param


def test_what_other_servers_put_into_messages_is_taken_back():
    """As openai-python dumps an answer: with every field of its model, most of them null."""
    nulls = ("refusal", "audio", "function_call", "tool_calls", "reasoning_content", "prefix")
    dumped = {"role": "assistant", "content": "x", "annotations": []} | dict.fromkeys(nulls)
    (answer,), _ = ask([("chat", {"messages": [USER, dumped, USER]})])
    assert answer.status == 200, answer.text


def test_fields_that_nobody_knows_are_counted_wherever_they_are(caplog):
    async def scenario():
        async with Server(says("a")) as server:
            part = {"type": "text", "text": "x", "cache_control": {}, "in_part": 1}
            messages = [USER | {"in_message": 1}, USER | {"content": [part]}] * 50
            options = {"include_usag": True, "include_usage": True}
            await server.chat(messages=messages, stream=True, stream_options=options)
            await server._post("/tokenize", {"messages": messages})
            return server.metrics.render().decode()

    with caplog.at_level(logging.WARNING):
        page = asyncio.run(scenario())
    for name, count in (("in_message", 2.0), ("in_part", 2.0), ("include_usag", 1.0)):
        assert f'hocket_unknown_fields_total{{field="{name}",model="m"}} {count}\n' in page
    assert "cache_control" not in page
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert "in_part of a content part," in " ".join(told)


def test_one_body_counts_so_many_names_and_no_more():
    async def scenario():
        async with Server(says("a")) as server:
            await server.complete(**{f"field_{number}": 1 for number in range(5000)})
            return server.metric("hocket_unknown_fields_total")

    assert asyncio.run(scenario()) == 64


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_tools_answer_names_its_call(path):
    async def scenario():
        async with Server(says("a")) as server:
            return await server._post(path, {"messages": [USER, {"role": "tool", "content": "4"}]})

    answer = asyncio.run(scenario())
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "messages.1.tool_call_id"


def test_priorities_need_the_policy_and_say_so():
    (answer, zero), _ = ask([("chat", {"priority": -1}), ("chat", {"priority": 0})])
    assert "--scheduling-policy priority" in answer.json()["error"]["message"]
    assert zero.status == 200
    (answer,), spec = ask([("chat", {"priority": -3})], policy="priority")
    assert (answer.status, spec.priority) == (200, -3)


def test_a_salt_is_mixed_with_a_secret_and_reaches_the_scheduler():
    async def scenario():
        async with Server(says("a")) as server:
            for salt in ("mine", "mine", "yours", None):
                await server.complete(cache_salt=salt, n=2)
            return [spec.cache_salt for spec in server.handle.specs.values()]

    first, second = asyncio.run(scenario()), asyncio.run(scenario())
    for salts in (first, second):
        mine, mine_too, mine_again, _, yours, _, none, _ = salts
        assert mine == mine_too == mine_again
        assert len({mine, yours, none, "mine", ""}) == 5
    assert not set(first) & set(second), "nobody can compute the salt of another start"


def test_unseeded_choices_and_prompts_draw_for_themselves():
    async def scenario():
        async with Server(says("a")) as server:
            await server.complete(prompt=["x", "x"], n=2)
            return [spec.params for spec in server.handle.specs.values()]

    params = asyncio.run(scenario())
    assert len({p.seed for p in params}) == 4
    assert [p.choice for p in params] == [0, 1, 0, 1]
