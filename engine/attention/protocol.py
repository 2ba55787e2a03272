"""The seam between dense slices: where keys and values are written and attended to."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engine.batch import ForwardBatch


class AttentionBackend(Protocol):
    """Attention over the blocks of one KV memory.

    `prepare` is called once a step and its result passed to `attend` once a layer; what it returns
    is the backend's own affair. Several prepared batches may be in flight at once.
    """

    capturable: bool  # whether `attend` may be captured into a CUDA graph

    def prepare(self, batch: ForwardBatch) -> Any:
        """Bring what the step's attention needs to the device."""
        ...

    def attend(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, prepared: Any
    ) -> Tensor:
        """Write k and v into their slots, then return the attention output, THD."""
        ...
