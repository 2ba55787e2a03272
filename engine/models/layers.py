"""The few operators that model families share. Pure functions of tensors.

Shape legend: T tokens, H heads, D head size, P = D / 2 rotation pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.models.errors import ModelFormatError


def rope_frequencies(head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    """Return the rotation of each pair per position, in radians, fp32 [P].

    `rope` is the `rope_parameters` of a Hugging Face config: `rope_theta` and a `rope_type` of
    default, linear (Chen et al. 2023) or llama3 (the Llama 3.1 release). Raises ModelFormatError
    for another type.
    """
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ModelFormatError(
            f"RoPE type {kind!r} is not supported",
            "use a model whose rope_type is default, linear or llama3",
        )
    exponent_P = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    try:
        frequency_P = 1.0 / (float(rope["rope_theta"]) ** exponent_P)
        return _ROPE_TYPES[kind](frequency_P, rope)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelFormatError(
            f"config.json lacks a usable field of RoPE type {kind!r}: {error!r}",
            "fetch the model again",
        ) from error


def _default(frequency_P: Tensor, _: Mapping[str, Any]) -> Tensor:
    return frequency_P


def _linear(frequency_P: Tensor, rope: Mapping[str, Any]) -> Tensor:
    return frequency_P / float(rope["factor"])


def _llama3(frequency_P: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Slow down long waves by `factor`, keep short ones, and blend between the two bounds."""
    original_len = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelength_P = 2 * math.pi / frequency_P
    blend_P = ((original_len / wavelength_P - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend_P) * frequency_P / float(rope["factor"]) + blend_P * frequency_P


_ROPE_TYPES = {"default": _default, "linear": _linear, "llama3": _llama3}


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Apply RoPE in the half-split convention of Hugging Face's Llama."""
    a, b = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-b, a), dim=-1) * sin_T1D
