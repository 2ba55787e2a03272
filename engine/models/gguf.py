"""Reading a GGUF file of architecture "llama" as a Hugging Face model: its config and its weights.

Owns the map from llama.cpp's names, order and quantisation to Hugging Face's. It reads no
vocabulary (text is not the engine's), writes no file, and guesses nothing: what it does not know
is a ModelFormatError, raised before the first weight is dequantised.

Source: llama.cpp's gguf-py/gguf/constants.py (keys, tensor names) and convert_hf_to_gguf.py
(`LlamaModel.permute`, which is undone here).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from engine.models.errors import ModelFormatError

SUPPORTED_TYPES = (
    ("F32", "F16", "BF16")
    + ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    + ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)

# Metadata that changes the computation in a way the llama slices do not have. The value that
# leaves it unchanged is allowed, because converters write it.
_NEUTRAL_VALUES: dict[str, object] = {
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scale_linear": 1.0,
    "llama.expert_count": 0,
    "llama.attention.sliding_window": 0,
    "split.count": 1,
}

_REMEDY = "use a GGUF of a plain llama model, or its Hugging Face folder with safetensors weights"


class _Target(NamedTuple):
    """Where a GGUF tensor goes. `heads` > 0: its rows are permuted within each of so many heads."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


class _QuickReader(GGUFReader):  # type: ignore[misc]  # the library is untyped
    """GGUFReader over a plain array, which slices in C where numpy's memmap calls Python.

    Every string of a vocabulary is a slice: 98,000 of them took 0.8 s so, 2.5 s otherwise.
    """

    @property
    def data(self) -> np.ndarray[Any, Any]:
        return self._data

    @data.setter
    def data(self, mapping: np.ndarray[Any, Any]) -> None:
        self._data = np.asarray(mapping)


def open_gguf(path: Path) -> GGUFReader:
    """Map the file and read its header; ModelFormatError if it is no GGUF or is cut short."""
    try:
        reader = _QuickReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelFormatError(
            f"{path.name} is not a readable GGUF file, or is cut short"
            f" ({type(error).__name__}: {error})",
            "download the file again and compare its size and hash with the source",
        ) from error
    if reader.byte_order != "I":
        raise ModelFormatError(
            f"{path.name} has the byte order of another kind of machine", "convert it on this one"
        )
    return reader


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """What Hugging Face's config.json of this model would say.

    Raises ModelFormatError for another architecture and for every feature of the llama family that
    is not supported (RoPE scaling, experts, sliding windows, a file split in parts).
    """
    arch = _value(reader, "general.architecture")
    if arch != "llama":
        raise ModelFormatError(f"GGUF architecture {arch!r}; supported: 'llama'", _REMEDY)
    for key, neutral in _NEUTRAL_VALUES.items():
        found = _value(reader, key, neutral)
        if found != neutral:
            raise ModelFormatError(
                f"GGUF has {key} = {found!r}; supported: {neutral!r}, or no such key", _REMEDY
            )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ModelFormatError("GGUF has no tensor token_embd.weight, so no weights", _REMEDY)
    hidden = _int(reader, "llama.embedding_length")
    heads = _int(reader, "llama.attention.head_count")
    head_dim = _int(reader, "llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _int(reader, key, head_dim) != head_dim:
            raise ModelFormatError(
                f"GGUF has {key} = {_value(reader, key)!r}; supported: the head size, {head_dim}",
                _REMEDY,
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _int(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _int(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _int(reader, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _int(reader, "llama.context_length"),
        "rms_norm_eps": _float(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(reader, "llama.rope.freq_base", 10_000.0),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id", None),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id", None),
        "dtype": "bfloat16",
    }


def iter_tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight as (Hugging Face name, contiguous bf16 tensor), one in memory at a time.

    Shapes are Hugging Face's: `[out, in]` for a matrix. Raises ModelFormatError before the first
    one if a tensor is unknown, missing, or of an unsupported shape or type.
    """
    targets = _targets(read_config(reader))
    _check_tensors(reader, targets)
    for tensor in reader.tensors:
        target = targets[tensor.name]
        values = dequantize(tensor.data, tensor.tensor_type)
        # F32 comes back as a view of the read-only mapping, which torch must not share.
        weight = torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(torch.bfloat16)
        yield target.name, _unpermute(weight, target.heads) if target.heads else weight


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of the rows of q or k, `[heads * head_dim, in]`.

    llama.cpp rotates neighbours (2i, 2i+1), Hugging Face rotates halves (i, i + head_dim/2); its
    converter reorders the rows so that both rotate the same numbers.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _targets(config: dict[str, Any]) -> dict[str, _Target]:
    """GGUF tensor name -> target, for every tensor that a model of this config has."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_rows, kv_rows = heads * config["head_dim"], kv_heads * config["head_dim"]
    vocab = (config["vocab_size"], hidden)
    targets = {
        "token_embd.weight": _Target("model.embed_tokens.weight", vocab),
        "output_norm.weight": _Target("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = _Target("lm_head.weight", vocab)
    layer = {
        "attn_norm": _Target("input_layernorm", (hidden,)),
        "attn_q": _Target("self_attn.q_proj", (q_rows, hidden), heads),
        "attn_k": _Target("self_attn.k_proj", (kv_rows, hidden), kv_heads),
        "attn_v": _Target("self_attn.v_proj", (kv_rows, hidden)),
        "attn_output": _Target("self_attn.o_proj", (hidden, q_rows)),
        "ffn_norm": _Target("post_attention_layernorm", (hidden,)),
        "ffn_gate": _Target("mlp.gate_proj", (inter, hidden)),
        "ffn_up": _Target("mlp.up_proj", (inter, hidden)),
        "ffn_down": _Target("mlp.down_proj", (hidden, inter)),
    }
    for index in range(config["num_hidden_layers"]):
        for name, target in layer.items():
            hf_name = f"model.layers.{index}.{target.name}.weight"
            targets[f"blk.{index}.{name}.weight"] = target._replace(name=hf_name)
    return targets


def _check_tensors(reader: GGUFReader, targets: dict[str, _Target]) -> None:
    found = {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(targets.keys() - found.keys()):
        raise ModelFormatError(
            f"GGUF lacks {len(missing)} of the model's tensors, {missing[0]} among them", _REMEDY
        )
    for name, tensor in found.items():
        if name not in targets:
            # rope_freqs.weight (Llama 3.1's RoPE scaling) and biases end here.
            raise ModelFormatError(
                f"GGUF has the tensor {name}, which is no part of a plain llama model", _REMEDY
            )
        if tensor.tensor_type.name not in SUPPORTED_TYPES:
            raise ModelFormatError(
                f"GGUF tensor {name} has type {tensor.tensor_type.name};"
                f" supported: {', '.join(SUPPORTED_TYPES)}",
                "use another quantisation of the model",
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != targets[name].shape:
            raise ModelFormatError(
                f"GGUF tensor {name} has shape {shape}, its metadata says {targets[name].shape}",
                _REMEDY,
            )


_REQUIRED: Any = object()


def _value(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ModelFormatError(f"GGUF has no metadata key {key}", _REMEDY)
    return default


def _int(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> int:
    value = _value(reader, key, default)
    if not isinstance(value, int):
        # A list here means that layers differ (OpenELM-like models).
        raise ModelFormatError(f"GGUF has {key} = {value!r}; supported: one number", _REMEDY)
    return value


def _float(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(_value(reader, key, default))))
