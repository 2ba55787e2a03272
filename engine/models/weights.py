"""Reads the tensors of a Hugging Face folder: safetensors only, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.errors import ModelFormatError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a folder by name; `take` reads one, from the pages of the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}  # safetensors handles, by file name
        self._file_of = self._locate()
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor. Raises ModelFormatError if it is missing or has another shape."""
        if name not in self._file_of:
            raise ModelFormatError(
                f"{self._folder.name}: tensor {name} is missing", "fetch the model again"
            )
        tensor = self._read(name)
        if tuple(tensor.shape) != shape:
            raise ModelFormatError(
                f"{self._folder.name}: tensor {name} is {tuple(tensor.shape)}, "
                f"but config.json asks for {shape}",
                "fetch the model again, or correct its config.json",
            )
        if tensor.dtype not in _DTYPES:
            raise ModelFormatError(
                f"{self._folder.name}: tensor {name} holds {tensor.dtype}",
                "quantised safetensors are not supported; use a float or bfloat16 model",
            )
        self._taken.add(name)
        return tensor

    def finish(self, *, unused: Callable[[str], bool]) -> None:
        """Raise ModelFormatError if a tensor was not taken and is not known to be `unused`.

        A tensor that the family does not read (a bias, say) means another model than was read.
        """
        left = [name for name in self._file_of if name not in self._taken and not unused(name)]
        if left:
            raise ModelFormatError(
                f"{self._folder.name}: {len(left)} tensors are not read, such as {left[0]}",
                "this variant of the architecture is not supported; use a plain one",
            )

    def _locate(self) -> dict[str, str]:
        index = self._folder / _INDEX
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelFormatError(
                    f"{index} cannot be read: {error!r}", "fetch the model again"
                ) from error
        if not (self._folder / _SINGLE).is_file():
            raise ModelFormatError(
                f"{self._folder} holds no {_SINGLE}",
                "name a Hugging Face folder with safetensors weights, or a .gguf file",
            )
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._open(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise ModelFormatError(
                f"{self._folder.name}: tensor {name} cannot be read: {error}",
                "fetch the model again",
            ) from error
        return tensor

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            try:
                self._files[file_name] = safe_open(self._folder / file_name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelFormatError(
                    f"{self._folder / file_name} cannot be read: {error}", "fetch the model again"
                ) from error
        return self._files[file_name]
