"""The fields that are in no schema: which are accepted, which are refused, which nobody knows.

A field that would change the output and cannot be honoured is refused by name. One that cannot
change it is accepted. One that nobody knows is accepted and counted: new clients send new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from serving.metrics import Metrics

log = logging.getLogger(__name__)

_TEXT_FORMAT = {"type": "text"}

# With the values that mean "off". Those that one endpoint knows are here for the other.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "detokenize": (None, True),
    "documents": (None, []),
    "early_stopping": (None, False),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "logprob_token_ids": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, _TEXT_FORMAT),
    "return_tokens_as_token_ids": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation_side": (None, "left"),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "web_search_options": (None,),
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


class UnknownFields:
    """Counts what nobody knows, and says so once for each name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[str] = set()

    def take(self, name: str) -> None:
        counted_as = self._metrics.unknown_field(name)
        if counted_as not in self._told:  # the metrics keep them few
            self._told.add(counted_as)
            log.warning("a client sent the field %s, which is not known here: ignored", counted_as)


def unsupported_field(extra: Mapping[str, Any] | None) -> str | None:
    """Return the name of a field that asks for what is not there, None if there is none."""
    for name, value in (extra or {}).items():
        if name in UNSUPPORTED and not _is_off(value, UNSUPPORTED[name]):
            return name
    return None


def unknown_fields(extra: Mapping[str, Any] | None) -> Iterable[str]:
    """Return the names that nobody knows."""
    return [name for name in extra or {} if name not in UNSUPPORTED and name not in ACCEPTED]


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    return any(value == known and type(value) is type(known) for known in off)
