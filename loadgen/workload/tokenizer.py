"""Text to token ids and back, as a model counts them. Special tokens are never added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loadgen.types import LoadError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ModelTokenizer:
    """Of a model folder, by the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class ByteTokenizer:
    """One token for each byte of UTF-8, as servers without a model count."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a model folder or a tokenizer.json, or for "bytes" the one of bytes.

    Raises LoadError if there is none.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    remedy = "name a model folder with a tokenizer.json, that file itself, or: bytes"
    if not path.is_file():
        raise LoadError(f"there is no tokenizer at {path}", remedy)
    try:
        import tokenizers  # late: half of what this tool does needs none

        return ModelTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except ImportError as error:
        raise LoadError(
            "the package tokenizers is not installed", "pip install tokenizers, or name none"
        ) from error
    except Exception as error:  # the library raises plain Exception
        raise LoadError(f"{path} is not a tokenizer: {error}", remedy) from error
