# env langchain: langchain-openai>=1,<2
# server: --fake --max-model-len 2048
"""langchain-openai: ChatOpenAI whole, in batches, streamed with usage, async; its error classes."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL, _ = sys.argv[1:]
HI = [SystemMessage("Be brief."), HumanMessage("Say something.")]
TO = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "max_retries": 0}


def holds(fact: object, what: str) -> None:
    assert fact, what
    print("ok", what, flush=True)


chat = ChatOpenAI(**TO, temperature=0, max_tokens=12, stream_usage=True)
whole = chat.invoke(HI)
holds(whole.content, "invoke answers")
holds(whole.usage_metadata["input_token_details"]["cache_read"] is not None, "cached tokens")
chunks = list(chat.stream(HI))
holds("".join(chunk.content for chunk in chunks) == whole.content, "stream says the same")
holds(any(chunk.usage_metadata for chunk in chunks), "the stream tells its usage")
holds([m.content for m in chat.batch([HI, HI])] == [whole.content] * 2, "batch says the same")
holds(asyncio.run(chat.ainvoke(HI)).content == whole.content, "ainvoke says the same")
call: Any = {"name": "f", "args": {"x": 1}, "id": "c1"}
told = [*HI, AIMessage("", tool_calls=[call]), ToolMessage("42", tool_call_id="c1")]
holds(chat.invoke(told).content, "a history with a tool's answer is taken as text")
scored = ChatOpenAI(**TO, max_tokens=4, logprobs=True, top_logprobs=2).invoke(HI)
holds(len(scored.response_metadata["logprobs"]["content"]) == 4, "log-probabilities")
holds(OpenAI(**TO, max_tokens=6).invoke("Once"), "the completions class answers")
for kind, options in (
    (openai.NotFoundError, {"model": "gpt-nothing"}),
    (openai.BadRequestError, {"top_p": 3}),
):
    try:
        ChatOpenAI(**TO | options).invoke(HI)
    except kind as error:
        holds(error.body, f"{options}: {kind.__name__}")
    else:
        raise AssertionError(options)
