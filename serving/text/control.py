"""Keeps what users type apart from control tokens: `<|im_start|>` in a message is twelve letters.

A template writes control tokens as text, and so may a user. Before rendering, each control token in
a user's text gets a stand-in for its first letter, a private character that nobody has typed; after
rendering, what still reads as a control token is the template's own, and the letters come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.errors import InvalidRequest

_PRIVATE = range(0xF0000, 0x10FFFE)
_PRIVATE_PATTERN = re.compile(f"[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The texts of a vocabulary's special tokens."""

    texts: frozenset[str]
    pattern: re.Pattern[str] = field(init=False, repr=False)
    first_letters: frozenset[str] = field(init=False, repr=False)
    beginnings: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # As the tokenizers library matches: leftmost, then longest.
        longest_first = sorted(self.texts, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        parts = {text[:size] for text in self.texts for size in range(1, len(text))}
        object.__setattr__(self, "pattern", re.compile(pattern))
        object.__setattr__(self, "first_letters", frozenset(text[0] for text in self.texts))
        object.__setattr__(self, "beginnings", frozenset(parts))


@dataclass(frozen=True, slots=True)
class Guard:
    """Stand-ins that are in none of the user's texts."""

    tokens: ControlTokens
    stand_ins: Mapping[str, str]  # by first letter
    end: str  # one more, to mark a place

    def shield(self, value: Any) -> Any:
        """Return the value with no control token, and no beginning of one at the end of a text."""
        if isinstance(value, str):
            return self._shield(value)
        if isinstance(value, list):
            return [self.shield(item) for item in value]
        if isinstance(value, dict):
            return {self._shield(key): self.shield(item) for key, item in value.items()}
        return value

    def restore(self, text: str) -> str:
        """Return the text as the user typed it."""
        for letter, stand_in in self.stand_ins.items():
            text = text.replace(stand_in, letter)
        return text

    def _shield(self, text: str) -> str:
        tokens = self.tokens
        if not any(letter in text for letter in tokens.first_letters):
            return text
        # A token may begin inside another, so once may not be enough.
        while tokens.pattern.search(text):
            text = tokens.pattern.sub(
                lambda found: self.stand_ins[found[0][0]] + found[0][1:], text
            )
        longest = max(map(len, tokens.beginnings), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if text[-size:] in tokens.beginnings:
                at = len(text) - size
                text = text[:at] + self.stand_ins[text[at]] + text[at + 1 :]
        return text


def make_guard(tokens: ControlTokens, typed: Iterable[str]) -> Guard:
    """Choose stand-ins that no typed text holds. Raises InvalidRequest if none is left."""
    used = {letter for text in typed for letter in _PRIVATE_PATTERN.findall(text)}
    letters = [*sorted(tokens.first_letters), ""]
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    chosen = dict(zip(letters, free, strict=False))
    if len(chosen) < len(letters):
        raise InvalidRequest("the messages use up the private characters", param="messages")
    end = chosen.pop("")
    return Guard(tokens, chosen, end)
