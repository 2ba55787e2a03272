# env litellm: litellm>=1.100,<2
# server: --fake --max-model-len 2048 --max-num-streams 4 --tenant-share 0.25
# tenants: modest greedy
"""LiteLLM, as hosted_vllm/ and openai/: answers, streams, and the classes of its errors."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
from urllib.parse import urlsplit

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL, MODEL, _ = sys.argv[1:]
MODEST, GREEDY = "modest-0123456789abcdef", "greedy-0123456789abcdef"
HI = [{"role": "user", "content": "Say something."}]


def holds(fact: object, what: str) -> None:
    assert fact, what
    print("ok", what, flush=True)


def ask(provider: str, *, key: str = MODEST, **options):
    asked = {"messages": HI, "max_tokens": 8, "temperature": 0, "model": f"{provider}/{MODEL}"}
    return litellm.completion(
        **asked | options, api_base=f"{URL}/v1", api_key=key, num_retries=0, max_retries=0
    )


@contextlib.contextmanager
def busy():
    """The greedy tenant has a stream open, which is all that it may have."""
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection(urlsplit(URL).netloc, timeout=30)
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {GREEDY}"}
    connection.request("POST", "/v1/completions", json.dumps(asked), head)
    connection.getresponse().readline()
    yield
    connection.close()


for provider in ("hosted_vllm", "openai"):
    whole = ask(provider)
    text = whole.choices[0].message.content
    holds(text and whole.usage.total_tokens, f"{provider}: answers")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(provider, stream=True)]
    holds("".join(pieces) == text, f"{provider}: streams the same")
    for kind, options in (
        (
            litellm.ContextWindowExceededError,
            {"messages": [{"role": "user", "content": "word " * 2000}]},
        ),
        (litellm.NotFoundError, {"model": f"{provider}/nothing"}),
        (litellm.BadRequestError, {"temperature": 9}),
        (litellm.AuthenticationError, {"key": "nobody-0123456789abcdef"}),
        (litellm.RateLimitError, {"key": GREEDY}),
    ):
        try:
            with busy():
                ask(provider, **options)
        except kind as error:
            holds(type(error) is kind, f"{provider}: {kind.__name__}")
        else:
            raise AssertionError(f"{provider}: no {kind.__name__}")
written = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="Once", max_tokens=6, api_base=f"{URL}/v1",
    api_key=MODEST,
)  # fmt: skip
holds(written.choices[0].text, "a completion answers")
