"""A tiny GGUF file, written with llama.cpp's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
MERGES = ("h e", "l l", "he ll", "Ġ hell")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (
    *SPECIALS,
    *sorted(ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<user>",
)
CONTROL, USER_DEFINED = 3, 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# (GGUF name, Hugging Face name, shape, heads to permute, type in the file)
LAYER = (
    ("attn_norm", "input_layernorm", (HIDDEN,), 0, Type.F32),
    ("attn_q", "self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN), HEADS, Type.Q8_0),
    ("attn_k", "self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN), KV_HEADS, Type.F32),
    ("attn_v", "self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN), 0, Type.F16),
    ("attn_output", "self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM), 0, Type.Q4_1),
    ("ffn_norm", "post_attention_layernorm", (HIDDEN,), 0, Type.F32),
    ("ffn_gate", "mlp.gate_proj", (INTER, HIDDEN), 0, Type.Q4_1),
    ("ffn_up", "mlp.up_proj", (INTER, HIDDEN), 0, Type.BF16),
    ("ffn_down", "mlp.down_proj", (HIDDEN, INTER), 0, Type.Q4_1),
)
Edit = Callable[[GGUFWriter], None]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (`LlamaModel.permute`)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_tiny_gguf(
    path: Path,
    *,
    arch: str = "llama",
    metadata: Mapping[str, str | int | float | bool] = {},
    tokens: Iterable[str] = TOKENS,
    drop: str = "",
    edit: Edit = lambda writer: None,
    tied: bool = True,
) -> dict[str, torch.Tensor]:
    """Write a llama of two layers; return what its Hugging Face weights should be, in bf16."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = list(tokens)
    types = {**dict.fromkeys(SPECIALS, CONTROL), "<user>": USER_DEFINED}
    vocab = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, 1) for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in {**vocab, **metadata}.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(key, value)

    table = [
        ("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), 0, Type.Q8_0),
        ("output_norm.weight", "model.norm.weight", (HIDDEN,), 0, Type.F32),
    ]
    if not tied:
        table.append(("output.weight", "lm_head.weight", (len(tokens), HIDDEN), 0, Type.F32))
    for index in range(LAYERS):
        for name, hf_name, *rest in LAYER:
            hf_name = f"model.layers.{index}.{hf_name}.weight"
            table.append((f"blk.{index}.{name}.weight", hf_name, *rest))
    rng = np.random.default_rng(0)
    expected = {}
    for name, hf_name, shape, heads, kind in table:
        weight = rng.standard_normal(shape).astype(np.float32)
        # Quantisation works along a row, so permuting rows before or after it is the same.
        values = np.array(dequantize(quantize(weight, kind), kind))
        expected[hf_name] = torch.from_numpy(values).to(torch.bfloat16)
        if name != drop:
            stored = permute(weight, heads) if heads else weight
            writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
