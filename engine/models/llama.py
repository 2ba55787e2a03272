"""The Llama family (Touvron et al. 2023) as dense slices: RMSNorm, RoPE, GQA, SwiGLU.

Shape legend: T tokens, E hidden size, H query heads, G key/value heads, D head size, F = MLP size,
Q = (H + 2 G) D, S sampled rows, V vocabulary. Weights are [out, in], as `F.linear` takes them,
and in a model what `Kernels.pack` makes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.errors import ModelFormatError
from engine.models.kernels import DEFAULT, Kernels
from engine.models.layers import rope_frequencies, rotate
from engine.models.slices import ModelShape, Projected
from engine.models.weights import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The fields of config.json that this family reads."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    norm_eps: float
    rope: dict[str, Any]
    tied: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> LlamaConfig:
        """Raises ModelFormatError for a missing field or a variant that is not supported."""
        plain_values = {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "quantization_config": None,
        }
        for field, plain in plain_values.items():
            if config.get(field, plain) != plain:
                raise ModelFormatError(
                    f"{field} = {config[field]!r} is not supported for Llama",
                    f"use a model whose config.json has {field} = {plain!r}",
                )
        try:
            # transformers 5 writes rope_parameters; older configs rope_theta beside rope_scaling.
            rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
            rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
            rope.setdefault("rope_type", rope.get("type", "default"))
            num_heads = int(config["num_attention_heads"])
            return cls(
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
                vocab_size=int(config["vocab_size"]),
                max_model_len=int(config["max_position_embeddings"]),
                norm_eps=float(config["rms_norm_eps"]),
                rope=rope,
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelFormatError(
                f"config.json lacks a usable field: {error!r}", "fetch the model again"
            ) from error


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; q, k and v are one matrix, gate and up another."""

    attention_norm_E: Tensor
    qkv_QE: Tensor
    out_EX: Tensor  # X = H D
    mlp_norm_E: Tensor
    gate_up_2FE: Tensor
    down_EF: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a model; the layers are read as they are asked for, once."""

    embedding_VE: Tensor
    layers: Iterator[Layer]
    norm_E: Tensor
    head_VE: Tensor


def read_weights(
    c: LlamaConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int, int], None],
) -> Weights:
    """Raises ModelFormatError, at the latest with the last layer, for what is not as it should."""
    e, f, x, g = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads

    def take(name: str, *shape: int) -> Tensor:
        return checkpoint.take(f"{name}.weight", shape).to(device=device, dtype=dtype)

    def layers() -> Iterator[Layer]:
        for index in range(c.num_layers):
            at = f"model.layers.{index}"
            qkv = [
                take(f"{at}.self_attn.{name}_proj", rows, e)
                for name, rows in (("q", x), ("k", g * c.head_dim), ("v", g * c.head_dim))
            ]
            on_layer(index + 1, c.num_layers)
            yield Layer(
                attention_norm_E=take(f"{at}.input_layernorm", e),
                qkv_QE=torch.cat(qkv),
                out_EX=take(f"{at}.self_attn.o_proj", e, x),
                mlp_norm_E=take(f"{at}.post_attention_layernorm", e),
                gate_up_2FE=torch.cat([take(f"{at}.mlp.{n}_proj", f, e) for n in ("gate", "up")]),
                down_EF=take(f"{at}.mlp.down_proj", e, f),
            )
        checkpoint.finish(
            unused=lambda name: (
                "rotary_emb.inv_freq" in name or (c.tied and name == "lm_head.weight")
            )
        )

    embedding = take("model.embed_tokens", c.vocab_size, e)
    return Weights(
        embedding_VE=embedding,
        layers=layers(),
        norm_E=take("model.norm", e),
        head_VE=embedding if c.tied else take("lm_head", c.vocab_size, e),
    )


def load(
    config: dict[str, Any],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int, int], None],
    kernels: Kernels = DEFAULT,
) -> LlamaSlices:
    """Read the weights into slices of torch's operators."""
    c = LlamaConfig.parse(config)
    return LlamaSlices(c, read_weights(c, checkpoint, dtype, device, on_layer), kernels)


class LlamaCarry(NamedTuple):
    """See `engine.models.slices.Carry`."""

    residual_TE: Tensor
    cos_T1D: Tensor
    sin_T1D: Tensor


class LlamaSlices:
    """See `engine.models.slices`."""

    def __init__(self, config: LlamaConfig, weights: Weights, kernels: Kernels) -> None:
        self._config = config
        self._embedding_VE = weights.embedding_VE
        self._layers = [_packed(layer, kernels.pack) for layer in weights.layers]
        self._norm_E = weights.norm_E
        # Logits in bfloat16 lie up to 1/8 apart: the likeliest tokens would often be equal, and the
        # lowest id win over the better token.
        self._head_VE = kernels.pack(weights.head_VE.to(torch.float32))
        self._linear, self._silu = kernels.linear, kernels.silu
        table = weights.embedding_VE
        self._frequency_P = rope_frequencies(config.head_dim, config.rope).to(table.device)
        self.shape = ModelShape(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            dtype=table.dtype,
            device=table.device,
        )

    def first(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[LlamaCarry, Projected]:
        angle_TP = positions_T.to(torch.float32)[:, None] * self._frequency_P
        angle_T1D = torch.cat((angle_TP, angle_TP), dim=-1)[:, None]
        carry = LlamaCarry(
            F.embedding(token_ids_T, self._embedding_VE),
            angle_T1D.cos().to(self.shape.dtype),
            angle_T1D.sin().to(self.shape.dtype),
        )
        return carry, self._project(0, carry)

    def middle(
        self, layer: int, carry: LlamaCarry, attended_THD: Tensor
    ) -> tuple[LlamaCarry, Projected]:
        residual_TE = self._finish(layer - 1, carry.residual_TE, attended_THD)
        carry = carry._replace(residual_TE=residual_TE)
        return carry, self._project(layer, carry)

    def last(self, carry: LlamaCarry, attended_THD: Tensor, tokens_S: Tensor) -> Tensor:
        # Only the sampled tokens go on: the others' hidden states are read by nobody.
        residual_SE = self._finish(
            self.shape.num_layers - 1, carry.residual_TE[tokens_S], attended_THD[tokens_S]
        )
        hidden_SE = self._norm(residual_SE, self._norm_E)
        return self._linear(hidden_SE.to(torch.float32), self._head_VE)

    def _project(self, layer: int, carry: LlamaCarry) -> Projected:
        """Norm, q, k, v, RoPE."""
        shape, weights = self.shape, self._layers[layer]
        hidden_TE = self._norm(carry.residual_TE, weights.attention_norm_E)
        qkv_TQD = self._linear(hidden_TE, weights.qkv_QE).view(len(hidden_TE), -1, shape.head_dim)
        qk_TID, v_TGD = torch.split(
            qkv_TQD, [shape.num_heads + shape.num_kv_heads, shape.num_kv_heads], dim=1
        )
        qk_TID = rotate(qk_TID, carry.cos_T1D, carry.sin_T1D)
        q_THD, k_TGD = torch.split(qk_TID, [shape.num_heads, shape.num_kv_heads], dim=1)
        return Projected(q_THD, k_TGD, v_TGD)

    def _finish(self, layer: int, residual_TE: Tensor, attended_THD: Tensor) -> Tensor:
        """Output projection and MLP of a layer, each added to the residual stream."""
        weights = self._layers[layer]
        residual_TE = residual_TE + self._linear(attended_THD.flatten(1), weights.out_EX)
        hidden_TE = self._norm(residual_TE, weights.mlp_norm_E)
        gate_TF, up_TF = self._linear(hidden_TE, weights.gate_up_2FE).chunk(2, dim=-1)
        return residual_TE + self._linear(self._silu(gate_TF) * up_TF, weights.down_EF)

    def _norm(self, x_TE: Tensor, weight_E: Tensor) -> Tensor:
        return F.rms_norm(x_TE, weight_E.shape, weight_E, self._config.norm_eps)


def _packed(layer: Layer, pack: Callable[[Tensor], Tensor]) -> Layer:
    return replace(
        layer,
        qkv_QE=pack(layer.qkv_QE),
        out_EX=pack(layer.out_EX),
        gate_up_2FE=pack(layer.gate_up_2FE),
        down_EF=pack(layer.down_EF),
    )
