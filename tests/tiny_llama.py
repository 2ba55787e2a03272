"""Writes tiny random Llama models, by transformers, for tests that need a folder to load."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB_SIZE = 131
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
# Of 8 pairs one is short enough to be kept, two are blended, and five are slowed down.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_model(folder: Path, *, max_shard_size: str = "1GB", **change) -> Path:
    """Let transformers write a random model; its weights are large enough for details to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **change}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, **change) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
