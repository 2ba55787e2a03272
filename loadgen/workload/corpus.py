"""Prose cut into pieces whose token counts add up, so that it is tokenised only once.

A piece starts with a space and a letter, where something other than a space comes before: there
nearly every tokenizer splits whatever stands on either side. Whether this one does is checked on
the whole corpus, not assumed.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np

from loadgen.types import LoadError
from loadgen.workload.lines import read_lines
from loadgen.workload.tokenizer import Tokenizer

_CUT = re.compile(r"(?<=\S)(?= [^\W\d_])")
# Words, and each sign that is none. English prose has about as many tokens: of Python's manual
# 114,029 of these are 112,955 tokens of SmolLM2 (1 % off).
_ROUGH_TOKEN = re.compile(r"\w+|[^\w\s]")
_DRAWS = 64  # of places for an excerpt; one of two or three fits a tokenizer of words
_SEAM_CHARS = 32  # on each side of a seam, beyond which no tokenizer looks


def default_text() -> str:
    """Return the topics of Python's manual: 465 kB of English that every Python 3 brings along.

    Other versions of Python bring other editions of it.
    """
    from pydoc_data.topics import topics  # late: it is large

    return "\n\n".join(topics[name] for name in sorted(topics))


def load_text(path: Path | None) -> str:
    """Return the text of a file, or the default. Raises LoadError for a file with no words."""
    if path is None:
        return default_text()
    text = "\n".join(line for _, line in read_lines(path)).strip()
    if not text:
        raise LoadError(f"{path} holds no text", "give a file of prose, or none for the default")
    return text


class Corpus:
    """A text, where it may be cut, and the tokens between the cuts."""

    def __init__(self, text: str, tokenizer: Tokenizer | None) -> None:
        self.text = text.strip()
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        self.count = rough_count if tokenizer is None else _counter(tokenizer)
        self._places = [0, *(cut.start() for cut in _CUT.finditer(self.text)), len(self.text)]
        self._opening_counts: dict[int, int] = {}
        self._tokenise(tokenizer)

    @property
    def num_tokens(self) -> int:
        return self._tokens_before[-1]

    def ids(self, num_tokens: int, rng: np.random.Generator) -> list[int]:
        """Return token ids from a random cut on, from the top again after the end."""
        start = self._tokens_before[int(rng.integers(len(self._places) - 1))] % len(self._ids)
        ids = self._ids[start : start + num_tokens]
        while len(ids) < num_tokens:
            ids += self._ids[: num_tokens - len(ids)]
        return ids

    def excerpt(self, num_tokens: int, rng: np.random.Generator, *, opens: bool) -> str | None:
        """Return prose of so many tokens from a random place between two cuts; None if none fits.

        What opens a prompt has lost its leading space; anything else starts with it, and counts
        what it counts behind other text. It never ends in a space.
        """
        last = bisect_right(self._tokens_before, self.num_tokens - num_tokens)
        for _ in range(_DRAWS if last > 1 else 0):
            first = int(rng.integers(1, last))
            end_token = self._tokens_before[first] + num_tokens
            if opens:
                end_token += self._opening_excess(first)
            if end_token <= self.num_tokens and (end := self._piece_at[end_token]) > first:
                text = self.text[self._places[first] : self._places[end]]
                return text[1:] if opens else text
        return None

    def splits(self, text: str, place: int) -> bool:
        """Whether the tokens of what stands before and behind `place` are those of the whole."""
        before = text[max(place - _SEAM_CHARS, 0) : place]
        behind = text[place : place + _SEAM_CHARS]
        return self.count(before + behind) == self.count(before) + self.count_behind(behind)

    def count_behind(self, text: str) -> int:
        """Count the tokens that `text` adds behind other text."""
        return self.count("x" + text) - self.count("x")

    def _tokenise(self, tokenizer: Tokenizer | None) -> None:
        pieces = [
            self.text[start:end] for start, end in zip(self._places, self._places[1:], strict=False)
        ]
        self._ids: list[int] = [] if tokenizer is None else tokenizer.encode(self.text)
        if tokenizer is None:
            counts = [rough_count(piece) for piece in pieces]
            self.is_additive = True
        else:
            num_before = self.count("x")
            split = {piece: tokenizer.encode("x" + piece)[num_before:] for piece in set(pieces)}
            split_ids = tokenizer.encode(pieces[0])
            counts = [len(split_ids), *(len(split[piece]) for piece in pieces[1:])]
            split_ids += [token for piece in pieces[1:] for token in split[piece]]
            self.is_additive = split_ids == self._ids
        self._tokens_before = [0, *accumulate(counts)]  # of each piece, and after the last
        self._piece_at = [-1] * (self.num_tokens + 1)  # that starts at a token
        for piece, num_tokens in enumerate(self._tokens_before):
            self._piece_at[num_tokens] = piece

    def _opening_excess(self, piece: int) -> int:
        """Tokens that a piece has more behind other text than at the start of a prompt."""
        if piece not in self._opening_counts:
            text = self.text[self._places[piece] : self._places[piece + 1]]
            self._opening_counts[piece] = self.count_behind(text) - self.count(text[1:])
        return self._opening_counts[piece]


def rough_count(text: str) -> int:
    return len(_ROUGH_TOKEN.findall(text))


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text))
