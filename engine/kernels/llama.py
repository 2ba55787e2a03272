"""The Llama family's slices in native kernels: three calls, whatever a slice has inside.

Owns the packed weights and the buffers that a batch goes through, which are reused from step to
step: one batch at a time. What a token becomes depends on no other token, bit for bit.

Shape legend: as in `engine.models.llama`; N = numbers of q, k and v together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.native import NativeKernels, extension
from engine.models.layers import rope_frequencies
from engine.models.llama import Layer, LlamaConfig, Weights, read_weights
from engine.models.slices import ModelShape, Projected
from engine.models.weights import Checkpoint

LANES = 16  # numbers of a vector, at every level
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads of a key head
_MIN_NUM_TOKENS = 64  # of the buffers, which grow by doubling


class NotForNative(Exception):
    """A model of shapes that the native kernels do not take; the text says which."""


def load(
    config: dict[str, Any],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int, int], None],
    kernels: NativeKernels,
) -> NativeLlama:
    """Read and pack the weights, a layer at a time. Raises NotForNative before the first."""
    c = LlamaConfig.parse(config)
    if device.type != "cpu":
        raise NotForNative(f"the model runs on {device}")
    for name, size in (
        ("hidden_size", c.hidden_size),
        ("intermediate_size", c.intermediate_size),
        ("head_dim", c.head_dim),
    ):
        if size % LANES:
            raise NotForNative(f"{name} = {size} is no multiple of {LANES}")
    if c.head_dim > MAX_HEAD_DIM or c.num_heads // c.num_kv_heads > MAX_GROUP:
        raise NotForNative(
            f"head_dim = {c.head_dim} with {c.num_heads} / {c.num_kv_heads} heads is too large"
        )
    return NativeLlama(c, read_weights(c, checkpoint, dtype, device, on_layer), kernels)


class NativeCarry(NamedTuple):
    """See `engine.models.slices.Carry`; the numbers are those of the model's buffers."""

    residual_TE: Tensor
    projected: Projected


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Memory of `size` tokens, and the same as the kernels know it."""

    size: int
    token_ids_T: Tensor
    positions_T: Tensor
    residual_TE: Tensor
    hidden_TE: Tensor
    qkv_TN: Tensor
    mlp_TF: Tensor
    native: Any


class NativeLlama:
    """See `engine.models.slices`."""

    def __init__(self, config: LlamaConfig, weights: Weights, kernels: NativeKernels) -> None:
        c = self._config = config
        dtype = weights.embedding_VE.dtype
        native = extension()
        self.machine = native.Machine(kernels.level, kernels.num_threads, dtype == torch.bfloat16)
        self.activation_dtype = (
            torch.float32 if self.machine.activation_bytes == 4 else torch.bfloat16
        )
        self.shape = ModelShape(
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            vocab_size=c.vocab_size,
            max_model_len=c.max_model_len,
            dtype=dtype,
            device=weights.embedding_VE.device,
        )
        frequency_P = rope_frequencies(c.head_dim, c.rope)
        angle_TP = torch.arange(c.max_model_len, dtype=torch.float32)[:, None] * frequency_P
        # The kernels know these by address: they live as long as the model.
        self._kept = [weights.embedding_VE.contiguous(), angle_TP.cos(), angle_TP.sin()]
        self._model = native.LlamaModel(
            self.machine,
            c.hidden_size,
            c.intermediate_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.vocab_size,
            c.norm_eps,
            *(tensor.data_ptr() for tensor in self._kept),
        )
        for layer in weights.layers:
            self._add(layer)
        norm_E = self._keep_norm(weights.norm_E)
        head_VE = weights.head_VE.contiguous()
        self._model.set_head(norm_E.data_ptr(), head_VE.data_ptr())
        self._batch = self._new_buffers(_MIN_NUM_TOKENS)
        self._sampled = self._new_buffers(_MIN_NUM_TOKENS)
        # Taken from the system once: new pages would be cleared every step.
        self._logits_SV = torch.empty(_MIN_NUM_TOKENS, c.vocab_size)

    def first(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[NativeCarry, Projected]:
        carry = self._take(token_ids_T, positions_T)
        self._model.first(self._batch.native, len(token_ids_T))
        return carry, carry.projected

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attention: Any,
        plan: Any,
        attended_THD: Tensor,
    ) -> NativeCarry:
        """Run `first`, and every `middle`, with `attention`, a native one, after each.

        Leaves the last layer's attention in `attended_THD`.
        """
        carry = self._take(token_ids_T, positions_T)
        self._model.forward(
            self._batch.native, len(token_ids_T), attention, plan, attended_THD.data_ptr()
        )
        return carry

    def middle(
        self, layer: int, carry: NativeCarry, attended_THD: Tensor
    ) -> tuple[NativeCarry, Projected]:
        self._model.middle(layer, self._batch.native, attended_THD.data_ptr(), len(attended_THD))
        return carry, carry.projected

    def last(self, _carry: NativeCarry, attended_THD: Tensor, tokens_S: Tensor) -> Tensor:
        num_rows = len(tokens_S)
        self._sampled = sampled = self._at_least(num_rows, self._sampled)
        if num_rows > len(self._logits_SV):
            self._logits_SV = torch.empty(sampled.size, self.shape.vocab_size)
        logits_SV = self._logits_SV[:num_rows]
        tokens_S = tokens_S.contiguous()
        self._model.last(
            self._batch.native,
            attended_THD.data_ptr(),
            sampled.native,
            tokens_S.data_ptr(),
            num_rows,
            logits_SV.data_ptr(),
        )
        return logits_SV

    def _take(self, token_ids_T: Tensor, positions_T: Tensor) -> NativeCarry:
        c, num_tokens = self._config, len(token_ids_T)
        self._batch = batch = self._at_least(num_tokens, self._batch)
        batch.token_ids_T[:num_tokens] = token_ids_T
        batch.positions_T[:num_tokens] = positions_T
        qkv_TXD = batch.qkv_TN[:num_tokens].view(num_tokens, -1, c.head_dim)
        sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        projected = Projected(*torch.split(qkv_TXD, sizes, dim=1))
        return NativeCarry(batch.residual_TE[:num_tokens], projected)

    def _add(self, layer: Layer) -> None:
        """Pack a layer. The kernels rotate neighbours, and see gate and up side by side."""
        c = self._config
        num_rotated = (c.num_heads + c.num_kv_heads) * c.head_dim
        rotated_NE, value_NE = layer.qkv_QE.tensor_split([num_rotated])
        halves_X2PE = rotated_NE.view(-1, 2, c.head_dim // 2, c.hidden_size)
        neighbours_NE = halves_X2PE.transpose(1, 2).reshape(num_rotated, c.hidden_size)
        gate_up_2XKE = layer.gate_up_2FE.view(2, -1, LANES, c.hidden_size)
        matrices = [
            torch.cat((neighbours_NE, value_NE)),
            layer.out_EX.contiguous(),
            gate_up_2XKE.transpose(0, 1).reshape(-1, c.hidden_size),
            layer.down_EF.contiguous(),
        ]
        qkv, out, gate_up, down = (matrix.data_ptr() for matrix in matrices)
        norms = [self._keep_norm(n) for n in (layer.attention_norm_E, layer.mlp_norm_E)]
        attention_norm, mlp_norm = (norm.data_ptr() for norm in norms)
        self._model.add_layer(attention_norm, qkv, out, mlp_norm, gate_up, down)

    def _keep_norm(self, weight_E: Tensor) -> Tensor:
        kept_E = weight_E.to(torch.float32).contiguous()
        self._kept.append(kept_E)
        return kept_E

    def _at_least(self, num_tokens: int, buffers: _Buffers) -> _Buffers:
        size = buffers.size
        while size < num_tokens:
            size *= 2
        return buffers if size == buffers.size else self._new_buffers(size)

    def _new_buffers(self, size: int) -> _Buffers:
        c, dtype = self._config, self.activation_dtype
        num_projected = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        tensors = (
            torch.zeros(size, dtype=torch.int64),
            torch.zeros(size, dtype=torch.int64),
            torch.zeros(size, c.hidden_size),
            torch.zeros(size, c.hidden_size, dtype=dtype),
            torch.zeros(size, num_projected, dtype=dtype),
            torch.zeros(size, c.intermediate_size, dtype=dtype),
        )
        native = extension().Buffers(*(tensor.data_ptr() for tensor in tensors))
        return _Buffers(size, *tensors, native)
