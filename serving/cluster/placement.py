"""What an instance asks of the node that it runs on: plain data. It places nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What an instance asks of the node that it runs on."""

    num_cpus: float = 0.0  # logical, as Ray counts them
    num_gpus: float = 0.0  # per device
    memory_bytes: int = 0  # logical; 0: not counted
    resources: tuple[tuple[str, float], ...] = ()  # custom Ray resources
    labels: tuple[tuple[str, str], ...] = ()  # node labels, e.g. ("gpu_type", "A100")
    num_devices: int = 1  # more than one: a placement group of so many bundles, STRICT_PACK
