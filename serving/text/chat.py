"""Messages to a prompt, by the model's own chat template, in bounded time, memory and length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import InvalidRequest
from serving.text.control import ControlTokens, Guard, make_guard
from serving.text.renderers import Renderers
from serving.text.tokenizer import TextCodec

# One that hangs is killed after this long, and the others go on.
TIME_LIMIT_S = 1.0
NUM_PROCESSES = 4
_MAX_GROWTH, _MAX_ADDED_CHARS = 4, 64 << 10
# What a client's chat_template_kwargs must not set, whatever the template reads.
_OURS = frozenset(
    {"messages", "add_generation_prompt", "tokenize", "raise_exception", "strftime_now"}
    | {"chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "tools", "documents"}
)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A prompt in which control tokens are the template's, and stand-ins mark the user's."""

    shielded: str
    guard: Guard

    @property
    def text(self) -> str:
        return self.guard.restore(self.shielded)

    def encode(self, codec: TextCodec, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids, in which what a user typed is never a control token."""
        if self.text == self.shielded and not codec.normalizes_control_tokens:
            return codec.encode(self.shielded, add_special_tokens=add_special_tokens)
        parts, at = [], 0
        for found in self.guard.tokens.pattern.finditer(self.shielded):
            parts += [(self.shielded[at : found.start()], False), (found[0], True)]
            at = found.end()
        parts.append((self.shielded[at:], False))
        typed = [(self.guard.restore(text), is_control) for text, is_control in parts if text]
        return codec.encode_parts(typed, add_special_tokens=add_special_tokens)


class ChatTemplate:
    """A model's template. Thread-safe; rendering is pure but for `strftime_now`."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        control_tokens: ControlTokens | None = None,
        *,
        limit_s: float = TIME_LIMIT_S,
        num_processes: int = NUM_PROCESSES,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._control_tokens = control_tokens or ControlTokens(frozenset())
        self._renderers = Renderers(source, num_processes=num_processes, limit_s=limit_s)

    def start(self) -> None:
        """Start what renders, so that the first request need not wait for it."""
        self._renderers.names()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Return the prompt; with `continue_final_message` it ends where the last message does.

        `variables` are a client's own. Raises InvalidRequest when the template does not read one of
        them, refuses the messages, or takes too long or writes too much.
        """
        self._check_names(variables or {})
        typed = json.dumps([messages, variables], ensure_ascii=False, default=dict)
        guard = make_guard(self._control_tokens, [typed, self.source])
        shielded = [guard.shield(dict(message)) for message in messages]
        if continue_final_message:
            shielded[-1]["content"] = (shielded[-1].get("content") or "") + guard.end
        text = self._renderers.render(
            {
                **guard.shield(dict(variables or {})),
                **self._special_tokens,
                "messages": shielded,
                "add_generation_prompt": add_generation_prompt,
            },
            _MAX_GROWTH * len(typed) + _MAX_ADDED_CHARS,
        )
        if continue_final_message:
            text, end, _ = text.rpartition(guard.end)
            if not end:
                raise InvalidRequest(
                    "the model's chat template does not show the final message",
                    param="continue_final_message",
                )
        return RenderedChat(text, guard)

    def _check_names(self, variables: Mapping[str, Any]) -> None:
        if not variables:
            return
        readable = self._renderers.names() - _OURS
        for name in variables:
            if name not in readable:
                known = ", ".join(sorted(readable)[:20]) or "none"
                raise InvalidRequest(
                    f"chat_template_kwargs: this model's template reads no "
                    f"{name[:50]!r}; it reads: {known}",
                    param="chat_template_kwargs",
                )


def chat_template(codec: TextCodec) -> ChatTemplate | None:
    """Return the template of a model; None if it has none."""
    if codec.template is None:
        return None
    return ChatTemplate(codec.template, codec.special_tokens, codec.control_tokens)
