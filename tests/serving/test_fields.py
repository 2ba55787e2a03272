"""Every field of a request: what it becomes, and which values are refused by name."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.scripted import MAX_MODEL_LEN, Server, encode, says


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
