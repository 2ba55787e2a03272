"""The vocabulary inside a GGUF file, as tokenizer.json and tokenizer_config.json.

Owns the map from llama.cpp's vocabulary metadata to a `tokenizers` pipeline. It reads no weights,
writes no file, and guesses nothing: a vocabulary that it cannot reproduce exactly is a
ModelFormatError, because a tokenizer that is nearly right makes a model quietly worse.

Source: llama.cpp's gguf-py/gguf/constants.py (keys, `TokenType`) and src/llama-vocab.cpp
(pre-tokenizers by name).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from tokenizers.processors import TemplateProcessing

from engine.models.errors import ModelFormatError

if TYPE_CHECKING:
    from gguf import GGUFReader

# gguf.constants.TokenType. UNUSED ones are padding of the embedding: plain entries nobody makes.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_REMEDY = "use the model's Hugging Face folder, which has its tokenizer.json"


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """The pieces of a Hugging Face tokenizer.

    `tokenizer_json` is the text of tokenizer.json, `tokenizer_config` the content of
    tokenizer_config.json, `special_ids` the id of each special token by its text.
    """

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    special_ids: dict[str, int]


def read_vocab(reader: GGUFReader) -> GgufVocab:
    """Rebuild the tokenizer; ModelFormatError if it is of another kind than byte-level BPE."""
    kind = _value(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFormatError(f"GGUF tokenizer {kind!r}; supported: 'gpt2' (BPE)", _REMEDY)
    pre = _value(reader, "tokenizer.ggml.pre") or "default"
    if pre not in PRE_TOKENIZERS:
        raise ModelFormatError(
            f"GGUF pre-tokenizer {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}", _REMEDY
        )
    tokens = _strings(reader, "tokenizer.ggml.tokens")
    types = _token_types(reader, len(tokens))

    tokenizer = Tokenizer(_bpe(tokens, _strings(reader, "tokenizer.ggml.merges")))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    special = {text: i for i, text in enumerate(tokens) if types[i] == _CONTROL}
    # They keep their ids, because the BPE vocabulary holds them too.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False)
            for i, text in enumerate(tokens)
            if types[i] == _USER_DEFINED
        ]
    )
    if wraps := _wrapping_tokens(reader, tokens):
        tokenizer.post_processor = wraps
    return GgufVocab(tokenizer.to_str(), _config(reader, tokens), special)


def _bpe(tokens: list[str], merges: list[str]) -> BPE:
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ModelFormatError(f"GGUF vocabulary has the token {twice!r} twice", _REMEDY)
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        # Byte-level tokens hold no blank, so the only one is the separator.
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFormatError(f"GGUF merge {merge!r} does not fit the vocabulary", _REMEDY)
        pairs.append((left, right))
    return BPE(vocab, pairs)


def _token_types(reader: GGUFReader, num_tokens: int) -> list[int]:
    types: list[int] = _value(reader, "tokenizer.ggml.token_type") or [_NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise ModelFormatError(f"GGUF has {num_tokens} tokens but {len(types)} types", _REMEDY)
    if other := set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise ModelFormatError(
            f"GGUF token types {sorted(other)}; supported: 1 normal, 3 control,"
            " 4 user defined, 5 unused",
            _REMEDY,
        )
    return types


def _wrapping_tokens(reader: GGUFReader, tokens: list[str]) -> TemplateProcessing | None:
    """The step that puts bos before and eos after a text, where the file asks for it."""
    bos, eos = (
        _token(reader, tokens, which)
        if _value(reader, f"tokenizer.ggml.add_{which}_token")
        else None
        for which in ("bos", "eos")
    )
    used = [text for text in (bos, eos) if text is not None]
    if not used:
        return None
    single = [bos, "$A", eos]
    return TemplateProcessing(
        single=[part for part in single if part is not None],
        special_tokens=[(text, tokens.index(text)) for text in dict.fromkeys(used)],
    )


def _config(reader: GGUFReader, tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json; the class makes transformers read tokenizer.json as it is."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    for ours, theirs in names.items():
        if (text := _token(reader, tokens, theirs)) is not None:
            config[f"{ours}_token"] = text
    arch = _value(reader, "general.architecture")
    if (length := _value(reader, f"{arch}.context_length")) is not None:
        config["model_max_length"] = length
    if (template := _value(reader, "tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config


def _token(reader: GGUFReader, tokens: list[str], which: str) -> str | None:
    """The text of the token that the file names as `which`, or None if it names none."""
    key = f"tokenizer.ggml.{which}_token_id"
    index: int | None = _value(reader, key)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ModelFormatError(f"GGUF has {key} = {index} of {len(tokens)} tokens", _REMEDY)
    return tokens[index]


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _strings(reader: GGUFReader, key: str) -> list[str]:
    field = reader.get_field(key)
    if field is None:
        raise ModelFormatError(f"GGUF has no metadata key {key}", _REMEDY)
    texts: list[str] = field.contents()
    return texts
