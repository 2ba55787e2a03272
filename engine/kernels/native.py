"""Which native kernels this process can use: the level of instructions, or why there is none.

Owns the choice and nothing else; the kernels themselves are in `native/`. The environment variable
HOCKET_KERNELS forces a level, or `torch` for none.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from engine.startup import CannotStart

VARIABLE = "HOCKET_KERNELS"
TORCH = "torch"


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """Kernels of one level of instructions, on so many threads."""

    level: str
    num_threads: int


@dataclass(frozen=True, slots=True)
class NoKernels:
    """Torch's operators do the work; `reason` says why, in words for the user."""

    reason: str


def extension() -> Any:
    """Return the compiled module. Raises ImportError where it was not built."""
    return importlib.import_module("engine.kernels._native")


def levels() -> list[str]:
    """Return the levels that this machine runs, the best last. Raises ImportError as above."""
    return list(extension().levels())


def choose(num_threads: int) -> NativeKernels | NoKernels:
    """Return the best kernels of this machine, or those that the environment asks for.

    Raises CannotStart if it asks for what is not there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == TORCH:
        return NoKernels(f"{VARIABLE}={TORCH}")
    try:
        found = levels()
    except ImportError:
        found, reason = [], "Hocket was installed without a C++ compiler"
    else:
        reason = "this processor has no AVX2"
    if wanted:
        if wanted not in found:
            known = ", ".join((TORCH, *found))
            raise CannotStart(
                f"{VARIABLE}={wanted}: there are no such kernels here", f"name one of: {known}"
            )
        return NativeKernels(wanted, num_threads)
    return NativeKernels(found[-1], num_threads) if found else NoKernels(reason)
