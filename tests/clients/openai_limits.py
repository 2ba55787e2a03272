# env openai2: openai>=2,<3
# env openai3: openai>=3,<4
# server: --fake --max-model-len 2048 --max-num-streams 4 --tenant-share 0.25
# tenants: modest greedy
"""openai-python with keys: what a wrong key and a tenant with too much open raise, and retries."""

from __future__ import annotations

import sys
import time
from typing import Any

import openai

URL, MODEL, _ = sys.argv[1:]
ASKED: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "temperature": 0}
LONG: dict[str, Any] = ASKED | {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}


def holds(fact: object, what: str) -> None:
    assert fact, what
    print("ok", what, flush=True)


def client(tenant: str, max_retries: int = 0) -> openai.OpenAI:
    key = f"{tenant}-0123456789abcdef"
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=key, max_retries=max_retries, timeout=30)


def raised(call: Any) -> openai.APIStatusError:
    try:
        call()
    except openai.APIStatusError as error:
        return error
    raise AssertionError("nothing was raised")


print("openai", openai.__version__)
modest, greedy = client("modest"), client("greedy")

for name, call in (
    ("models", client("nobody").models.list),
    ("a completion", lambda: client("nobody").completions.create(**ASKED)),
    ("a stream", lambda: client("nobody").completions.create(**ASKED, stream=True)),
):
    error = raised(call)
    holds(type(error) is openai.AuthenticationError, f"a wrong key, {name}: AuthenticationError")
    holds((error.status_code, error.code) == (401, "invalid_api_key"), "... 401 invalid_api_key")
    holds(error.request_id, "... with a request id")

with greedy.completions.create(**LONG, stream=True) as stream:
    next(iter(stream))  # all that this tenant may have
    for name, options in (("whole", {}), ("as a stream", {"stream": True})):
        error = raised(lambda options=options: greedy.completions.create(**ASKED, **options))
        holds(type(error) is openai.RateLimitError, f"too much open, {name}: RateLimitError")
        holds((error.status_code, error.code) == (429, "rate_limit_exceeded"), "... 429")
        holds(error.type == "rate_limit_error", "... of the type rate_limit_error")
        wait = error.response.headers
        holds(int(wait["retry-after"]) >= 1 <= int(wait["retry-after-ms"]), "... says when")
        holds(error.request_id, "... with a request id")
    answer = modest.completions.create(**ASKED)
    holds(answer.choices[0].text, "another tenant is served meanwhile")

end_s = time.monotonic() + 10
while True:  # the server has seen within a moment that the stream was closed
    try:
        answer = greedy.completions.create(**ASKED)
        break
    except openai.RateLimitError:
        assert time.monotonic() < end_s, "its place was not given back"
holds(answer.choices[0].text, "a tenant that has closed its stream is served again")
with greedy.completions.create(**LONG | {"max_tokens": 200}, stream=True) as stream:
    next(iter(stream))
    answer = client("greedy", max_retries=8).completions.create(**ASKED)
holds(answer.choices[0].text, "with retries the client waits as told, and is served")
