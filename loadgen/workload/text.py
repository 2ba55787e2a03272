"""Prompts of real prose, of an exact number of tokens.

A prompt opens with a few words from one random place of the corpus and goes on from another, so
that two prompts differ within their first block and a prefix cache does not hit by accident.
A prompt that is wanted longer than half the corpus has more such excerpts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from loadgen.types import LoadError, Prompt
from loadgen.workload.corpus import Corpus
from loadgen.workload.tokenizer import Tokenizer

_OPENING_TOKENS = 6
_TRIES = 20
_MAX_CHARS_PER_TOKEN = 32  # of prose; runs of signs may have more, and are then not found


class Counted(NamedTuple):
    """A prompt and its tokens; None: not counted, as there is no tokenizer."""

    prompt: Prompt
    num_tokens: int | None


class Prompts(Protocol):
    def make(
        self, num_tokens: int, rng: np.random.Generator, head: Counted | None = None
    ) -> Counted:
        """Return a prompt of `num_tokens` in all, which starts with `head`."""
        ...


class PromptMaker:
    """Prompts as text. Without a tokenizer their count is only about what was asked for."""

    def __init__(self, corpus: str, tokenizer: Tokenizer | None = None) -> None:
        self.corpus = Corpus(corpus, tokenizer)
        self._is_counted = tokenizer is not None

    def make(
        self, num_tokens: int, rng: np.random.Generator, head: Counted | None = None
    ) -> Counted:
        """Return text that the tokenizer encodes into exactly `num_tokens`.

        It neither starts nor ends with a space, as chat templates strip those. Raises LoadError
        if no such text was found, for instance with a corpus of few words.
        """
        start = "" if head is None else str(head.prompt)
        num_own = num_tokens - self._num_tokens(head)
        text = self._search(start, num_own, num_tokens, rng) if num_own > 0 else start
        return Counted(text, num_tokens if self._is_counted else None)

    def ids(self, num_tokens: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Return token ids of the corpus, which are `num_tokens` whatever the text says."""
        num_opening = min(_OPENING_TOKENS, num_tokens)
        opening = self.corpus.ids(num_opening, rng)
        return (*opening, *self.corpus.ids(num_tokens - num_opening, rng))

    def _num_tokens(self, head: Counted | None) -> int:
        if head is None:
            return 0
        return self.corpus.count(str(head.prompt)) if head.num_tokens is None else head.num_tokens

    def _search(self, start: str, num_own: int, num_tokens: int, rng: np.random.Generator) -> str:
        aim = num_own
        for _ in range(_TRIES):
            composed = self._compose(start, aim, rng)
            if composed is None:
                continue
            text, seams = composed
            if self.corpus.is_additive and all(self.corpus.splits(text, at) for at in seams):
                return text
            missing = num_tokens - self.corpus.count(text)
            if not missing:
                return text
            aim = max(1, aim + missing)
        return self._cut(start, num_own, num_tokens, rng)

    def _compose(
        self, start: str, num_tokens: int, rng: np.random.Generator
    ) -> tuple[str, list[int]] | None:
        """Put excerpts behind `start`; return the text and where they meet, None if none fit."""
        text = start
        seams = []
        for size in self._sizes(num_tokens):
            excerpt = self.corpus.excerpt(size, rng, opens=not text)
            if excerpt is None:
                return None
            if text:
                seams.append(len(text))
            text += excerpt
        return text, seams

    def _sizes(self, num_tokens: int) -> list[int]:
        if num_tokens <= 2 * _OPENING_TOKENS:
            return [num_tokens]
        rest = num_tokens - _OPENING_TOKENS
        num_excerpts = -(-rest // max(self.corpus.num_tokens // 2, 1))
        size = rest // num_excerpts
        return [_OPENING_TOKENS, size + rest % num_excerpts, *[size] * (num_excerpts - 1)]

    def _cut(self, start: str, num_own: int, num_tokens: int, rng: np.random.Generator) -> str:
        """Put text behind `start` that ends where the count is right, inside a word if need be."""
        source = self.corpus.text + "\n"
        num_chars = num_own * _MAX_CHARS_PER_TOKEN
        for _ in range(_TRIES):
            place = int(rng.integers(len(source)))
            repeats = 1 + (place + num_chars) // len(source)
            tail = (source * repeats)[place : place + num_chars]
            text = start + (tail if start else tail.lstrip())
            lengths = range(len(start), len(text))
            length = bisect_left(lengths, num_tokens, key=lambda n: self.corpus.count(text[:n]))
            found = text[: len(start) + length]
            if self.corpus.count(found) == num_tokens and found == found.rstrip():
                return found
        raise LoadError(
            f"no prompt of exactly {num_tokens} tokens was found",
            "give a longer text, or another length",
        )


class IdPrompts:
    """Prompts as token ids, whose count no tokenizer can change."""

    def __init__(self, draw: Callable[[int, np.random.Generator], tuple[int, ...]]) -> None:
        self._draw = draw

    def make(
        self, num_tokens: int, rng: np.random.Generator, head: Counted | None = None
    ) -> Counted:
        start = () if head is None else head.prompt
        assert isinstance(start, tuple)
        return Counted((*start, *self._draw(num_tokens - len(start), rng)), num_tokens)


def random_ids(vocab_size: int) -> IdPrompts:
    """Return prompts of ids in [0, vocab_size), all alike: no prose, and no tokenizer needed."""
    return IdPrompts(lambda num, rng: tuple(rng.integers(vocab_size, size=num).tolist()))
