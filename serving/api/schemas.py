"""Request bodies, as OpenAI's API and vLLM's extensions define them. Shapes only, no behaviour.

Null means default everywhere, as many clients send it. What is in no schema, `known_fields` judges.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from scheduler.types import MAX_SEED

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128
MAX_SALT_CHARS = 256
MAX_TEMPLATE_VALUES = 32
MAX_TEMPLATE_VALUE_CHARS = 256
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TIMEOUT_S = 86_400
# What fits into a header, and into a log line.
REQUEST_ID = r"^[!-~]{1,128}$"

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# The first bad item is enough: thousands of errors would hold up every stream.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]

NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _short(most: int) -> BeforeValidator:
    """Check the length of an object before its values, each of which may be an error."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"must have at most {most} entries")
        return value

    return BeforeValidator(check)


def _checked_template_value(value: Any) -> Any:
    """Raise ValueError for what is no plain value: one error, where a union has one a branch."""
    if isinstance(value, str) and len(value) > MAX_TEMPLATE_VALUE_CHARS:
        raise ValueError(f"must have at most {MAX_TEMPLATE_VALUE_CHARS} characters")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("must be a text, a number, true, false or null")


LogitBiases = Annotated[
    dict[str, Bias], Field(max_length=MAX_LOGIT_BIASES), _short(MAX_LOGIT_BIASES)
]
PlainValue = bool | int | float | str | None
TemplateValue = Annotated[
    PlainValue, PlainValidator(_checked_template_value, json_schema_input_type=PlainValue)
]
TemplateValues = Annotated[
    dict[str, TemplateValue], Field(max_length=MAX_TEMPLATE_VALUES), _short(MAX_TEMPLATE_VALUES)
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=32)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    logit_bias: LogitBiases | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)] | None = None
    return_token_ids: bool | None = None
    return_metrics: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def asked_max_tokens(self) -> int | None:
        return self.max_tokens

    def echoes_only(self) -> bool:
        """Whether nothing is to be generated: the prompt, with its scores, is the answer."""
        return False

    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def wants_usage_always(self) -> bool:
        """Whether every chunk is to tell the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


def _checked_prompt(value: Any) -> Any:
    """Raise ValueError for a prompt of none of the four shapes.

    By whole lists at a time: pydantic's way, item by item for each shape, takes 0.2 s for a body of
    1 MiB, and every stream waits for it.
    """
    kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
    if kinds == {list}:
        kinds = set(map(type, chain.from_iterable(value)))
        if kinds <= {int}:
            return value
    elif kinds == {str} or (isinstance(value, list) and kinds <= {int}):
        return value  # which ids there are, the vocabulary knows
    raise ValueError("must be a text, token ids, or a list of texts or of lists of token ids")


PromptShapes = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(_Generation):
    """`prompt` is a text, token ids, or a list of either."""

    prompt: Annotated[
        PromptShapes, PlainValidator(_checked_prompt, json_schema_input_type=PromptShapes)
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 only with echo
    logprobs: NumLogprobs | None = None
    echo: bool | None = None

    def num_logprobs(self) -> int | None:
        """Return how many of the likeliest tokens each position shows; None for no scores."""
        return self.logprobs

    def echoes_only(self) -> bool:
        return self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or isinstance(prompt[0], int):
            return [cast(list[int], prompt)]
        return cast(list[str | list[int]], prompt)


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: (
        Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    def plain(self) -> dict[str, Any]:
        """Return what a chat template reads: the text of the content, and what is set."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        for name in ("name", "tool_calls", "tool_call_id"):
            value = getattr(self, name)
            if value:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return message


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object: templates write them as they like."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatPrompt(BaseModel):
    """Messages, and how the model's template is to render them."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateValues | None = None


class ChatRequest(_Generation, ChatPrompt):
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    def num_logprobs(self) -> int | None:
        """Return how many of the likeliest tokens each position shows; None for no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(BaseModel):
    """A `prompt`, or `messages`: exactly one of them."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # by default for a prompt only
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateValues | None = None

    def chat(self) -> ChatPrompt:
        """Return what is to be rendered, if there are messages."""
        return ChatPrompt.model_construct(
            messages=self.messages or [],
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: TokenIds
