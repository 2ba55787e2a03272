"""A tiny GGUF written with llama.cpp's own writer, read back as a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from engine.models.errors import ModelFormatError
from engine.models.gguf import iter_tensors, open_gguf, read_config
from tests.tiny_gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTER,
    KV_HEADS,
    LAYERS,
    TOKENS,
    Edit,
    write_tiny_gguf,
)


def test_the_config_is_hugging_faces(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    assert read_config(open_gguf(tmp_path / "m.gguf")) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_theta": 5000.0,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_as_they_were_before_llama_cpp(tmp_path: Path, tied: bool) -> None:
    expected = write_tiny_gguf(tmp_path / "m.gguf", tied=tied)
    reader = open_gguf(tmp_path / "m.gguf")
    found = dict(iter_tensors(reader))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].is_contiguous()
        assert torch.equal(found[name], weight), name
    assert read_config(reader)["tie_word_embeddings"] is tied


def _add(name: str, kind: Type = Type.F32) -> Edit:
    """Add a tensor: four float32, or one 54-byte block of TQ1_0."""
    data = np.zeros(54, np.uint8) if kind == Type.TQ1_0 else np.zeros(4, np.float32)
    return lambda writer: writer.add_tensor(name, data, raw_dtype=kind)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'; supported: 'llama'"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = 'yarn'"),
        ({"metadata": {"llama.rope.scaling.factor": 8.0}}, "llama.rope.scaling.factor = 8.0"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
        ({"metadata": {"split.count": 3}}, "split.count = 3"),
        ({"metadata": {"llama.attention.value_length": 16}}, "supported: the head size, 8"),
        ({"edit": _add("rope_freqs.weight")}, "rope_freqs.weight"),
        ({"edit": _add("blk.0.attn_q.bias")}, "blk.0.attn_q.bias"),
        ({"drop": "blk.1.attn_k.weight"}, "lacks 1 of the model's tensors, blk.1.attn_k.weight"),
        ({"drop": "token_embd.weight"}, "token_embd.weight"),
        (
            {"drop": "output_norm.weight", "edit": _add("output_norm.weight")},
            r"shape \(4,\), its metadata says \(32,\)",
        ),
        (
            {"drop": "output_norm.weight", "edit": _add("output_norm.weight", Type.TQ1_0)},
            "type TQ1_0; supported: F32",
        ),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(tmp_path: Path, change: dict, found: str) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(ModelFormatError, match=found) as error:
        next(iter_tensors(open_gguf(tmp_path / "m.gguf")))
    assert error.value.remedy
    assert "\n" not in error.value.cause


@pytest.mark.parametrize("kept", [0, 3, 30, 200, 5_000, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "m.gguf"
    write_tiny_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ModelFormatError, match=r"m\.gguf is not a readable GGUF file"):
        open_gguf(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\3\4 this is a zip" * 100)
    with pytest.raises(ModelFormatError, match="magic invalid"):
        open_gguf(path)
