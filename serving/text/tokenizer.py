"""Text to token ids and back, for one model. Wraps the `tokenizers` library.

Also knows which tokens end an answer, and, for `--fake`, a tokenizer that needs no model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serving.errors import InvalidRequest, UserError
from serving.text.control import ControlTokens
from serving.text.pieces import PieceBytes, TextsAlone

# The answers of the checksum executor: 95 printable ASCII characters and the end of the answer.
FAKE_VOCAB_SIZE = 96
_FAKE_EOS = "<|im_end|>"
FAKE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TextCodec:
    """The tokenizer of the served model. Thread-safe: the library's encode and decode are."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        template: str | None,
        special_tokens: dict[str, str],
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._literal: Tokenizer | None = None  # a copy to which control tokens are text
        self._copying = threading.Lock()
        self._pieces = PieceBytes(tokenizer)
        self._texts_alone = {
            skips: TextsAlone(tokenizer, skip_special_tokens=skips) for skips in (False, True)
        }
        special = [
            token for token in tokenizer.get_added_tokens_decoder().values() if token.special
        ]
        self.control_tokens = ControlTokens(frozenset(token.content for token in special))
        # Then text that is no control token may become one, so each must be looked for apart.
        self.normalizes_control_tokens = tokenizer.normalizer is not None and any(
            token.normalized for token in special
        )
        self.eos_token_ids = eos_token_ids
        self.template = template
        self.special_tokens = special_tokens  # name (bos_token, ...) -> text, for the template

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size), added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids; `add_special_tokens` adds what the model wants around a plain prompt.

        A special token's text becomes that token. Raises InvalidRequest for text that is not
        Unicode: JSON can carry half a surrogate pair.
        """
        return _ids(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def encode_parts(
        self, parts: Sequence[tuple[str, bool]], *, add_special_tokens: bool
    ) -> list[int]:
        """Return the ids of (text, is a control token): what is not one is text throughout."""
        ids: list[int] = []
        for text, is_control in parts:
            if is_control:
                ids.append(cast(int, self._tokenizer.token_to_id(text)))
            else:
                ids += _ids(self._literal_tokenizer(), text, add_special_tokens=False)
        if add_special_tokens:
            bare, wrapped = (self.encode("x", add_special_tokens=with_) for with_ in (False, True))
            starts = range(len(wrapped) - len(bare) + 1)
            at = next(i for i in starts if wrapped[i : i + len(bare)] == bare)
            ids = wrapped[:at] + ids + wrapped[at + len(bare) :]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text; incomplete UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def texts_alone(self, *, skip_special_tokens: bool) -> TextsAlone:
        """Return the texts of single tokens; all who ask share them."""
        return self._texts_alone[skip_special_tokens]

    def decode_long(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Do what `decode` does, letting other threads run meanwhile."""
        (text,) = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def piece(self, token_id: int) -> str | None:
        """Return how the vocabulary spells a token; None for an id without one."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece

    def prepare(self) -> None:
        """Make what the first text with a control token in it would wait for: 0.1 s."""
        self._literal_tokenizer()

    def _literal_tokenizer(self) -> Tokenizer:
        with self._copying:
            if self._literal is None:
                self._literal = Tokenizer.from_str(self._tokenizer.to_str())
                self._literal.encode_special_tokens = True
            return self._literal

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes that this token adds, special or not; None for an id without one.

        A token may be a piece of a character, so these bytes need not be UTF-8.
        """
        return self._pieces.of(token_id)


def _ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text holds half a surrogate pair, which is not Unicode"
        raise InvalidRequest(message) from error
    # Of the library's ways in, the one that lets other threads run: `encode` stops them all for
    # half a second at 1 MiB, this one for 3 ms, and it takes half the time.
    (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoded.ids
    return ids


def load_codec(folder: Path) -> TextCodec:
    """Read tokenizer.json and what belongs to it. Raises UserError for a folder without one."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path} cannot be read: {error}", "name a model folder with a tokenizer.json"
        ) from error
    settings = _read_json(folder / "tokenizer_config.json")
    special_tokens = {
        name: token if isinstance(token, str) else token["content"]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := settings.get(name))
    }
    return TextCodec(
        tokenizer,
        _eos_token_ids(folder, tokenizer, special_tokens),
        _template(folder, settings),
        special_tokens,
    )


def fake_codec() -> TextCodec:
    """Return a byte-level tokenizer whose first 96 ids are what the checksum executor says."""
    printable = [chr(code) if code > 32 else "Ġ" for code in range(32, 127)]
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(printable))
    vocab = {piece: index for index, piece in enumerate([*printable, _FAKE_EOS, *others])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_FAKE_EOS, special=True), AddedToken("<|im_start|>")])
    return TextCodec(tokenizer, (vocab[_FAKE_EOS],), FAKE_CHAT_TEMPLATE, {"eos_token": _FAKE_EOS})


def _eos_token_ids(
    folder: Path, tokenizer: Tokenizer, special_tokens: dict[str, str]
) -> tuple[int, ...]:
    """Union of generation_config.json, config.json and the tokenizer's own end token."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    eos = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    if eos is not None:
        ids.add(eos)
    return tuple(sorted(ids))


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", "fetch the model again") from error
    return value if isinstance(value, dict) else {}
