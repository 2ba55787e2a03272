"""Llama as dense slices: tiny random models against transformers, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.errors import ModelFormatError
from engine.models.registry import load_model
from tests.exact.measure import logit_errors
from tests.exact.reference import Reference
from tests.exact.teacher import Script, Stage, teach
from tests.tiny_llama import LINEAR, LLAMA3, VOCAB_SIZE, edit_config, write_model

VARIANTS: dict[str, dict] = {
    "default rope, heads 4/4": {},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": LINEAR},
    "tied head": {"tie_word_embeddings": True},
    "heads 8/4": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "heads 4/1": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "heads 6/6": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6},
    "wide heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24},
    "one layer": {"num_hidden_layers": 1},
}
TOLERANCE = 1e-5  # of the row's largest magnitude


# --- transformers --------------------------------------------------------------------------------


def check_against_transformers(folder: Path) -> None:
    """Eight random scripts, 16 tokens a step, and KV memory for a third of them."""
    rng = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB_SIZE) for _ in range(number))

    lengths = (7, 1, 40, 2, 16, 23, 17, 3)
    scripts = [Script(tokens(length), tokens(20)) for length in lengths]
    stage = Stage(budget=16, max_num_running=6, num_blocks=24, block_size=4)
    logits_NPV, played = teach(load_model(folder, "float32"), scripts, stage)
    assert played.num_preemptions >= 3
    assert played.num_mixed_steps >= 10
    reference = Reference(folder, torch.float32)
    right_NPV = torch.stack([reference.whole(script) for script in scripts])
    assert logit_errors(logits_NPV, right_NPV).max <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_bfloat16_model_are_fp32(tmp_path: Path, tied: bool) -> None:
    model = load_model(write_model(tmp_path, tie_word_embeddings=tied), "bfloat16")
    token_T = torch.arange(40)
    carry, qkv = model.first(token_T, token_T)
    logits_SV = model.last(carry, qkv.q_THD, token_T)
    assert logits_SV.dtype is torch.float32
    is_rounded_SV = logits_SV == logits_SV.to(torch.bfloat16)
    assert is_rounded_SV.float().mean() < 0.1, "they were rounded on the way"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    check_against_transformers(write_model(tmp_path, **VARIANTS[variant]))


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    write_model(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_against_transformers(tmp_path)


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_a_config_of_older_transformers_means_the_same(tmp_path: Path, rope: dict) -> None:
    write_model(tmp_path, rope_parameters=rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope is LINEAR:  # older still
        scaling["type"] = scaling.pop("rope_type")
    edit_config(tmp_path, rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=scaling)
    check_against_transformers(tmp_path)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM", "LlamaForCausalLM"),
        ({"architectures": []}, "none named", "LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True", "attention_bias = False"),
        ({"mlp_bias": True}, "mlp_bias = True", "mlp_bias = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'", "hidden_act = 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'", "default, linear or llama3"),
        ({"rms_norm_eps": None}, "lacks a usable field: KeyError", "fetch the model again"),
        ({"num_attention_heads": 0}, r"asks for \(0, 64\)", "correct its config.json"),
        ({"architectures": "LlamaForCausalLM"}, "none named", "LlamaForCausalLM"),
        ({"rope_parameters": "llama3"}, "ValueError", "fetch the model again"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor'", "fetch the model again"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "TypeError", "fetch the model again"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "= None"),
        ({"num_hidden_layers": 1}, "tensors are not read, such as model.layers.1", "plain one"),
        ({"intermediate_size": 96}, r"\(112, 64\).*\(96, 64\)", "correct its config.json"),
    ],
)
def test_a_config_that_is_not_supported_is_refused(
    tmp_path: Path, change: dict, cause: str, remedy: str
) -> None:
    edit_config(write_model(tmp_path), **change)
    check_refusal(tmp_path, cause, remedy)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, path)
    check_refusal(tmp_path, rf"{name} holds torch\.int8", "float or bfloat16")
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, path)
    check_refusal(tmp_path, rf"{name} holds torch\.float8", "float or bfloat16")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file({**weights, **bias}, path)
    check_refusal(tmp_path, "1 tensors are not read, such as .*q_proj.bias", "plain one")
    del weights[name]
    save_file(weights, path)
    check_refusal(tmp_path, f"{name} is missing", "fetch the model again")
    path.write_bytes(path.read_bytes()[:1000])
    check_refusal(tmp_path, "cannot be read", "fetch the model again")
    path.unlink()
    check_refusal(tmp_path, "holds no model.safetensors", "safetensors")


@pytest.mark.parametrize(
    ("index", "cause"),
    [
        ("{", "index.json cannot be read"),
        ("{}", "index.json cannot be read: KeyError"),
        ('{"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}', "gone.safetensors"),
        ('{"weight_map": {"model.embed_tokens.weight": "other.safetensors"}}', "cannot be read"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, index: str, cause: str) -> None:
    write_model(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    check_refusal(tmp_path, cause, "fetch the model again")


def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    check_refusal(tmp_path, "cannot be read", "Hugging Face")
    for text, cause in (("{", "cannot be read"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        check_refusal(tmp_path, cause, "model")


def check_refusal(folder: Path, cause: str, remedy: str) -> None:
    with pytest.raises(ModelFormatError, match=cause) as error:
        load_model(folder, "float32")
    assert remedy in error.value.remedy
    assert "\n" not in error.value.cause
