"""openai-python against a running server: what the official client sees must be right."""

from __future__ import annotations

import openai
import pytest

from tests.serving.servers import running_server


@pytest.fixture(scope="module")
def server():
    with running_server("--fake", "--max-model-len", "512") as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


IGNORE_EOS = {"ignore_eos": True}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "fake", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **options}
    )


def complete(client, **options):
    return client.completions.create(
        **{"model": "fake", "prompt": "Once", "max_tokens": 24, "temperature": 0, **options}
    )


def test_a_chat_streams_what_it_answers_whole(client):
    whole = chat(client)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content, "the role comes with the first token"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    cached = [
        usage.prompt_tokens_details.cached_tokens for usage in (whole.usage, chunks[-1].usage)
    ]
    assert cached == [0, whole.usage.prompt_tokens - 1], "the same prompt is computed once"
    assert {c.id for c in chunks} == {chunks[0].id}


def test_a_completion_streams_what_it_answers_whole(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_usage_counts_prompts_once_and_tokens_always(client):
    answer = complete(
        client, prompt=["Once", "upon a"], n=2, temperature=1.0, extra_body=IGNORE_EOS
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 96)
    assert usage.total_tokens == 106


def test_a_seed_repeats_and_choices_differ(client):
    options = {"temperature": 1.0, "n": 2, "seed": 7}
    first, second = (
        [choice.text for choice in complete(client, **options).choices] for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]
    assert [c.text for c in complete(client, **options | {"seed": 8}).choices] != first


def test_token_ids_are_taken_and_returned(client):
    extra = {"return_token_ids": True, "ignore_eos": True}
    by_text = complete(client, extra_body=extra)
    prompt = [ord(letter) - 32 for letter in "Once"]
    by_ids = complete(client, prompt=prompt, extra_body=extra)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert len(by_ids.choices[0].token_ids) == 24
    chunks = list(complete(client, prompt=prompt, stream=True, extra_body=extra))
    streamed = [token for c in chunks for token in c.choices[0].token_ids]
    assert streamed == by_ids.choices[0].token_ids


def test_a_stop_string_ends_the_text_before_it(client):
    whole = complete(client).choices[0].text
    stop = whole[10:12]
    cut = complete(client, stop=stop)
    assert cut.choices[0].text == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens == whole.find(stop) + 2
    streamed = complete(client, stop=[stop, "\u2603"], stream=True)
    assert "".join(c.choices[0].text for c in streamed) == cut.choices[0].text


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("fake", "model", 512)
    assert client.models.retrieve("fake") == model


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as error:
        chat(client, model="gpt-4")
    assert error.value.code == "model_not_found"
    assert "fake" in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_an_over_long_prompt_is_400(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as error:
        complete(client, prompt="x" * 512)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "prompt"


def test_what_the_window_leaves_is_the_limit(client):
    answer = complete(client, prompt="x" * 500, max_tokens=400, extra_body=IGNORE_EOS)
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_honoured_is_400_and_names_the_field(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **options)
    assert error.value.type == "invalid_request_error"
    assert (error.value.param or "").split(".")[0] == param


def test_nulls_and_neutral_values_mean_defaults(client):
    nulls = dict.fromkeys(("stop", "seed", "top_p", "n", "logprobs", "logit_bias", "user"))
    neutral = {"presence_penalty": 0.0, "best_of": 1, "a_field_of_next_year": True}
    assert complete(client, extra_body={**nulls, **neutral}).choices
