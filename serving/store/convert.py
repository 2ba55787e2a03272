"""From a GGUF file to a Hugging Face folder: config, weights in bfloat16, tokenizer, origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import UserError

if TYPE_CHECKING:
    from serving.progress import Progress

# Part of every folder's name: raise it when the conversion changes, and old folders are redone.
CONVERSION = 1


def convert(gguf: Path, out: Path, source: dict[str, Any], progress: Progress) -> None:
    """Write `out`, the Hugging Face folder of the model in `gguf`."""
    progress.phase("reading", None)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from engine.models.errors import ModelFormatError
    from engine.models.gguf import iter_tensors, open_gguf, read_config
    from serving.text.gguf_vocab import read_vocab

    try:
        reader = open_gguf(gguf)
        config, vocab = read_config(reader), read_vocab(reader)
        progress.phase("converting", len(reader.tensors))
        tensors = {}
        for name, tensor in iter_tensors(reader):
            tensors[name] = tensor
            progress.advance(len(tensors))
    except ModelFormatError as error:
        raise UserError(error.cause, error.remedy) from error

    progress.phase("writing", None)
    out.mkdir()
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # A chat model ends its turn with this token, whatever its base model ended a text with.
    special["eos_token_id"] = vocab.special_ids.get("<|im_end|>", special["eos_token_id"])
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", special)
    _write_json(out / "tokenizer_config.json", vocab.tokenizer_config)
    (out / "tokenizer.json").write_text(vocab.tokenizer_json, encoding="utf-8")
    weights = out / "model.safetensors"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, most likely; it wraps the OSError
        raise OSError(f"{weights.name}: {error}") from error
    # safetensors makes it private; an image built by root serves as somebody else.
    weights.chmod((out / "config.json").stat().st_mode)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    conversion = {"version": CONVERSION, "dtype": "bfloat16", "from": "GGUF"}
    _write_json(out / "ORIGIN.json", {"source": source, "conversion": conversion, "files": sizes})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
