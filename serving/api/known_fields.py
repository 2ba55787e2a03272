"""The fields that are in no schema: which are accepted, which are refused, which nobody knows.

A field that would change the output or the answer and cannot be honoured is refused by name. One
that cannot change them is accepted. One that nobody knows is accepted and counted: new clients send
new ones. So are those that only tune how an answer is delivered, such as vLLM's `stream_interval`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from serving.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from serving.metrics import Metrics

log = logging.getLogger(__name__)

AnyBody = CompletionRequest | ChatRequest | TokenizeRequest | DetokenizeRequest

# Of one body; the names are the client's, and there may be a hundred thousand.
_MAX_COUNTED = 64

_TEXT_FORMAT = {"type": "text"}

# With the values that mean "off". Those that one endpoint knows are here for the other.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "custom_logit_processor": (None,),
    "detokenize": (None, True),
    "documents": (None, []),
    "dry_multiplier": (None, 0, 0.0),
    "early_stopping": (None, False),
    "ebnf": (None, ""),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "grammar": (None, ""),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "json_schema": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "logprob_token_ids": (None, []),
    "max_completion_tokens": (None,),
    "media_io_kwargs": (None, {}),
    "messages": (None,),
    "mirostat": (None, 0),
    "mm_payload": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "n_predict": (None, -1),
    "n_probs": (None, 0),
    "no_stop_trim": (None, False),
    "prompt": (None,),
    "prompt_embeds": (None,),
    "reasoning_effort": (None, "none"),
    "regex": (None, ""),
    "repetition_detection": (None, {}),
    "response_format": (None, _TEXT_FORMAT),
    "return_hidden_states": (None, False),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "stop_regex": (None, "", []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation_side": (None, "left"),
    "typical_p": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
    "web_search_options": (None,),
    "xtc_probability": (None, 0, 0.0),
}

# They change nothing here: labels of the client's, hints, and what concerns tools or reasoning.
ACCEPTED = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "user",
        "verbosity",
    }
)


class _Object(NamedTuple):
    """What is known of the fields of a part of a body; `inside` names it in the log."""

    inside: str
    unsupported: Mapping[str, tuple[Any, ...]]
    accepted: frozenset[str] = frozenset()


_BODY = _Object("", UNSUPPORTED, ACCEPTED)
_STREAM_OPTIONS = _Object(" of stream_options", {})
# A client sends the answers of other servers back as messages, with all that these put into them.
_MESSAGE = _Object(
    " of a message",
    {
        "audio": (None,),
        "function_call": (None,),
        "images": (None, []),
        "partial": (None, False),
        "prefix": (None, False),
        "reasoning": (None, ""),
        "reasoning_content": (None, ""),
        "reasoning_details": (None, []),
        "refusal": (None, ""),
        "thinking_blocks": (None, []),
        "tools": (None, []),
    },
    frozenset({"annotations", "cache_control"}),
)
_OTHER_CONTENT = ("audio_url", "file", "image_url", "input_audio", "refusal", "video_url")
_PART = _Object(
    " of a content part",
    dict.fromkeys(_OTHER_CONTENT, (None,)),
    frozenset({"annotations", "cache_control"}),
)


class UnknownFields:
    """Counts what nobody knows, and says so once for each name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[str] = set()

    def take(self, body: AnyBody) -> None:
        """Count each name once, wherever and however often the body has it."""
        places: dict[str, str] = {}
        for name, inside in _unknown(body):
            places.setdefault(name, inside)
            if len(places) == _MAX_COUNTED:
                break
        for name, inside in places.items():
            counted_as = self._metrics.unknown_field(name)
            if counted_as not in self._told:  # the metrics keep them few
                self._told.add(counted_as)
                log.warning(
                    "a client sent the field %s%s, which is not known here: ignored",
                    counted_as,
                    inside,
                )


def unsupported_field(body: AnyBody) -> str | None:
    """Return the path of a field that asks for what is not there, None if there is none."""
    for path, kind, extra in _extras(body):
        name = first_on(extra, kind.unsupported)
        if name is not None:
            return path + name
    return None


def first_on(
    fields: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]] = UNSUPPORTED
) -> str | None:
    """Return the name of a field that is not off, None if all are."""
    for name, value in fields.items():
        if name in unsupported and not _is_off(value, unsupported[name]):
            return name
    return None


def _unknown(body: AnyBody) -> Iterator[tuple[str, str]]:
    for _, kind, extra in _extras(body):
        for name in extra:
            if name not in kind.unsupported and name not in kind.accepted:
                yield name, kind.inside


def _extras(body: AnyBody) -> Iterator[tuple[str, _Object, Mapping[str, Any]]]:
    """Yield the path, what is known, and what is in no schema, of each object that has such."""
    if body.model_extra:
        yield "", _BODY, body.model_extra
    if isinstance(body, CompletionRequest | ChatRequest):
        options = body.stream_options
        if options is not None and options.model_extra:
            yield "stream_options.", _STREAM_OPTIONS, options.model_extra
    if isinstance(body, ChatRequest | TokenizeRequest):
        yield from _extras_of_messages(body.messages or ())


def _extras_of_messages(
    messages: Iterable[Message],
) -> Iterator[tuple[str, _Object, Mapping[str, Any]]]:
    for number, message in enumerate(messages):
        if message.model_extra:
            yield f"messages.{number}.", _MESSAGE, message.model_extra
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                if part.model_extra:
                    yield f"messages.{number}.content.{place}.", _PART, part.model_extra


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    return any(value == known and type(value) is type(known) for known in off)
