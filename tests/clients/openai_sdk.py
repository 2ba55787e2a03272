# env openai2: openai>=2,<3
# env openai3: openai>=3,<4
# server: --fake --max-model-len 2048
"""openai-python: sync, async, streams, log-probabilities, choices, seeds and error classes."""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from typing import Any

import openai

URL, MODEL, _ = sys.argv[1:]
HI: Any = [{"role": "user", "content": "Say something."}]
LATE = {"timeout": 0.05, "ignore_eos": True}
BARE: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 30}
client = openai.OpenAI(**BARE)


def holds(fact: object, what: str) -> None:
    assert fact, what
    print("ok", what, flush=True)


def chat(**options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0} | options
    )


def complete(**options):
    return client.completions.create(
        **{"model": MODEL, "prompt": "Once", "max_tokens": 12, "temperature": 0} | options
    )


@contextmanager
def raises(kind: type[Exception], what: str, **fields: object):
    try:
        yield
    except openai.APIError as error:
        holds(type(error) is kind, f"{what}: {type(error).__name__}")
        for name, value in fields.items():
            holds(getattr(error, name) == value, f"{what}: {name} is {getattr(error, name)!r}")
        holds(isinstance(error.body, dict) and error.body["message"], f"{what}: has a message")
        if isinstance(error, openai.APIStatusError):
            holds(error.request_id, f"{what}: has a request id")
    else:
        raise AssertionError(f"{what}: nothing was raised")


def answers() -> None:
    whole = chat()
    holds(whole.choices[0].message.content, "a chat answers")
    holds(whole.choices[0].message.role == "assistant", "the answer is the assistant's")
    holds(whole.usage.prompt_tokens_details.cached_tokens is not None, "usage tells cached tokens")
    holds(whole.system_fingerprint, "the answer has a fingerprint")
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    holds(text == whole.choices[0].message.content, "a streamed chat says the same")
    roles = [c.choices[0].delta.role for c in chunks if c.choices]
    holds(roles[0] == "assistant" and not any(roles[1:]), "the role comes once, at first")
    holds(chunks[0].choices[0].delta.content, "... together with the first text")
    holds(chunks[-1].choices == [] and chunks[-1].usage.total_tokens, "the last chunk is the usage")
    with client.chat.completions.stream(model=MODEL, messages=HI, max_tokens=8) as stream:
        kinds = [event.type for event in stream]
        try:
            reason = stream.get_final_completion().choices[0].finish_reason
        except openai.LengthFinishReasonError:  # how the helper says so
            reason = "length"
    holds(kinds.count("content.delta") > 1, "the .stream() helper yields events")
    holds(reason in ("stop", "length"), f"... and ends: {reason}")
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]
    same = chat(messages=[{"role": "user", "content": parts}])
    holds(same.choices[0].message.content == text, "content in parts is the same text")
    holds(complete().choices[0].text, "a completion answers")
    ids = complete(prompt=[[1, 2, 3], [4, 5]], n=2)
    holds([c.index for c in ids.choices] == [0, 1, 2, 3], "prompts of ids, n=2: choices in order")
    holds(len(client.models.list().data) == 1, "the models are listed")
    holds(client.models.retrieve(MODEL).id == MODEL, "a model is shown")


def scores_and_seeds() -> None:
    entries = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    holds(all(len(entry.top_logprobs) == 3 for entry in entries), "chat: top_logprobs")
    scores = complete(logprobs=2, echo=True, max_tokens=1).choices[0].logprobs
    holds(scores.token_logprobs[0] is None, "echo: the first token has no score")
    holds(
        len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 5,
        "echo: arrays cover the prompt and one more",
    )
    first, again, other = (chat(temperature=1, seed=seed, n=3) for seed in (7, 7, 8))
    texts = [[c.message.content for c in answer.choices] for answer in (first, again, other)]
    holds(texts[0] == texts[1] != texts[2], "a seed repeats itself, another does not")
    holds(len(set(texts[0])) == 3, "choices of one seed differ")


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(**BARE) as many:
        asked: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0}
        streams = [await many.chat.completions.create(**asked, stream=True) for _ in range(8)]
        texts = [
            "".join([c.choices[0].delta.content or "" async for c in stream]) for stream in streams
        ]
        holds(len(set(texts)) == 1 and texts[0], "eight async streams say the same")
        answer = await many.completions.create(model=MODEL, prompt="Once", max_tokens=4)
        holds(answer.choices[0].text, "an async completion answers")


def errors() -> None:
    with raises(openai.NotFoundError, "an unknown model", code="model_not_found", param="model"):
        chat(model="gpt-nothing")
    with raises(openai.BadRequestError, "a bad value", param="temperature"):
        chat(temperature=9)
    with raises(openai.BadRequestError, "no messages", param="messages"):
        chat(messages=[])
    with raises(openai.BadRequestError, "too long", code="context_length_exceeded"):
        chat(messages=[{"role": "user", "content": "word " * 2000}])
    with raises(openai.BadRequestError, "tools", param="tools"):
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with raises(openai.BadRequestError, "structured output", param="response_format"):
        chat(response_format={"type": "json_object"})
    with raises(openai.NotFoundError, "no such route"):
        client.post("/nothing", body={}, cast_to=object)
    with raises(openai.InternalServerError, "a deadline", status_code=504, code="request_timeout"):
        chat(max_tokens=1500, extra_body=LATE)
    with raises(openai.APIError, "a deadline in a stream", code="request_timeout"):
        for _ in chat(max_tokens=1500, stream=True, extra_body=LATE):
            pass


print("openai", openai.__version__)
answers()
scores_and_seeds()
asyncio.run(asynchronous())
errors()
