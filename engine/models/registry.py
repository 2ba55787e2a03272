"""From a Hugging Face folder to dense slices: which architecture is which module."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.kernels.native import NativeKernels
from engine.models.errors import ModelFormatError
from engine.models.kernels import DEFAULT, Kernels
from engine.models.slices import DenseSlices
from engine.models.weights import Checkpoint


class Family(NamedTuple):
    """The modules whose `load` makes a family's slices."""

    torch: str
    native: str


# By the architecture that config.json names.
ARCHITECTURES = {"LlamaForCausalLM": Family("engine.models.llama", "engine.kernels.llama")}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises ModelFormatError if there is none or it is not an object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFormatError(
            f"{path} cannot be read: {error}", "name a Hugging Face model folder or a .gguf file"
        ) from error
    if not isinstance(config, dict):
        raise ModelFormatError(f"{path} is not a JSON object", "fetch the model again")
    return config


def resolve_dtype(name: str, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """Return the dtype to compute in. `auto` is the checkpoint's, where the device is good at it.

    A CPU without bfloat16 instructions emulates it, many times slower than float32.
    """
    if name != "auto":
        return DTYPES[name]
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if stored == "float32":
        return torch.float32
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def load_model(
    folder: Path,
    dtype: str = "auto",
    device: str = "cpu",
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
    kernels: Kernels | NativeKernels = DEFAULT,
) -> DenseSlices:
    """Read the model in `folder`; `on_layer(done, total)` reports progress.

    Raises ModelFormatError for what is not supported or not complete, NotForNative for shapes that
    native kernels do not take.
    """
    config = read_config(folder)
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        names = ["(none named)"]
    if names[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelFormatError(
            f"architecture {names[0]} is not supported", f"use a model of: {known}"
        )
    family = ARCHITECTURES[names[0]]
    module = import_module(family.native if isinstance(kernels, NativeKernels) else family.torch)
    where = torch.device(device)
    with torch.inference_mode():
        slices: DenseSlices = module.load(
            config,
            Checkpoint(folder),
            resolve_dtype(dtype, config, where),
            where,
            on_layer,
            kernels,
        )
    return slices
