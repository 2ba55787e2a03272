"""Single tokens, their bytes and texts, as the vocabularies of the `tokenizers` library write them.

Byte-level vocabularies spell each byte as a printable letter; those of SentencePiece spell a space
as U+2581 and a lone byte as <0xHH>. Which one it is, the tokenizer's decoder tells.
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer

_LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class PieceBytes:
    """A table that fills as it is asked. Thread-safe: an entry made twice is the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content.encode()
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._kinds = _decoder_kinds(tokenizer)
        self._known: dict[int, bytes | None] = {}

    def of(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; None for an id that the vocabulary does not have."""
        if token_id not in self._known:
            self._known[token_id] = self._make(token_id)
        return self._known[token_id]

    def _make(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return None
        if "ByteLevel" in self._kinds:
            if all(letter in _BYTE_OF for letter in piece):
                return bytes(_BYTE_OF[letter] for letter in piece)
            return str(piece).encode()
        lone = _LONE_BYTE.fullmatch(piece) if "ByteFallback" in self._kinds else None
        if lone is not None:
            return bytes.fromhex(lone[1])
        if self._kinds & {"Metaspace", "Replace"}:
            return str(piece).replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()


class TextsAlone(dict[int, str]):
    """What each token reads as when it stands alone. Fills as it is asked, on any thread.

    Where texts `join`, a whole character is never more than its bytes: a text without U+FFFD is the
    same in any answer.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self.join = _decoder_kinds(tokenizer) == {"ByteLevel"}

    def __missing__(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=self._skips_special)
        self[token_id] = text
        return text


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Return the types of the tokenizer's decoder and of those it is made of."""
    if tokenizer.decoder is None:
        return set()
    kinds: set[str] = set()
    rest = [json.loads(tokenizer.decoder.__getstate__())]
    while rest:
        decoder = rest.pop()
        kinds.add(decoder["type"])
        rest += decoder.get("decoders", [])
    return kinds


def _byte_letters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 letters stand for themselves, others for 256 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
