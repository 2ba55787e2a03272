"""What answers look like, for /openapi.json: shapes only. Answers are built as plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer but 2xx has this body."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class RequestTimings(BaseModel):
    """Of the first choice, in milliseconds; the first token is counted from the first step."""

    time_to_first_token_ms: float | None
    generation_time_ms: float | None
    queue_time_ms: float | None
    mean_itl_ms: float | None
    tokens_per_second: float | None


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: dict[str, Any] | None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionChoice(_Choice):
    text: str
    prompt_token_ids: list[int] | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(_Choice):
    message: ChatMessage


class _Generated(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    metrics: RequestTimings | None = None


class Completion(_Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatCompletion(_Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    context_length: int
    max_input_tokens: int
    max_output_tokens: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Version(BaseModel):
    version: str


class Load(BaseModel):
    server_load: int


class Status(BaseModel):
    status: str


def answered_with(
    model: type[BaseModel] | None, *, streams: bool = False
) -> dict[int | str, dict[str, Any]]:
    """Return a route's `responses`: its answer, and the error object for everything else."""
    good: dict[str, Any] = {"description": "Success"}
    if model is not None:
        good["model"] = model
    if streams:
        text = {"schema": {"type": "string", "description": "`data: JSON` events, then [DONE]"}}
        good["content"] = {"text/event-stream": text}
    return {
        200: good,
        "4XX": {"model": ErrorAnswer, "description": "The request is refused"},
        "5XX": {
            "model": ErrorAnswer,
            "description": "The server failed, or is not taking requests",
        },
    }


# What load balancers ask: they read the status alone.
EMPTY: dict[int | str, dict[str, Any]] = {
    200: {"description": "An instance is up", "content": {}},
    503: {"description": "No instance is up", "content": {}},
}
