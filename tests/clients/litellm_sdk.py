# env litellm: litellm>=1.100,<2
# server: --fake --max-model-len 2048 --max-num-running 1 --max-num-waiting 0
"""LiteLLM, as hosted_vllm/ and openai/: answers, streams, and the classes of its errors."""

from __future__ import annotations

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL, MODEL, _ = sys.argv[1:]
HI = [{"role": "user", "content": "Say something."}]


def holds(fact: object, what: str) -> None:
    assert fact, what
    print("ok", what, flush=True)


def ask(provider: str, *, url: str = f"{URL}/v1", **options):
    asked = {"messages": HI, "max_tokens": 8, "temperature": 0, "model": f"{provider}/{MODEL}"}
    return litellm.completion(
        **asked | options, api_base=url, api_key="none", num_retries=0, max_retries=0
    )


class _TooMany(BaseHTTPRequestHandler):
    """The answer that the server gives a tenant over its limit; it needs keys to give it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = (
            b'{"error": {"message": "over the limit", "type": "rate_limit_error",'
            b' "param": null, "code": "rate_limit_exceeded"}}'
        )
        self.send_response(429)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after", "1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


stub = HTTPServer(("127.0.0.1", 0), _TooMany)
threading.Thread(target=stub.serve_forever, daemon=True).start()
STUB = f"http://127.0.0.1:{stub.server_port}/v1"

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
        (litellm.RateLimitError, {"url": STUB}),
    ):
        try:
            ask(provider, **options)
        except kind as error:
            holds(type(error) is kind, f"{provider}: {kind.__name__}")
        else:
            raise AssertionError(f"{provider}: no {kind.__name__}")
written = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="Once", max_tokens=6, api_base=f"{URL}/v1",
    api_key="none",
)  # fmt: skip
holds(written.choices[0].text, "a completion answers")
