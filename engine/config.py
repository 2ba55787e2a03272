"""Settings of one instance, as plain data, so that any process can be told to build it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.profile import Profile

BLOCK_SIZE = 16  # tokens; small enough to waste little, large enough for long copies


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to serve and within which limits; None means: as the machine and the model allow."""

    model_name: str
    model_folder: Path | None  # None: the checksum executor
    dtype: str = "auto"
    device: str = "cpu"
    num_threads: int | None = None
    kv_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    max_step_s: float | None = None  # of a step while requests decode
    profile: Profile | None = None  # what steps cost; None: measured at start
    max_num_running: int = 64
    max_num_waiting: int = 512
    depth: int = 1  # steps in flight
    policy: str = "fcfs"
    prefix_caching: bool = True
    batch_invariant: bool = False
    decision_log: Path | None = None
    fake_vocab_size: int = 96
    fake_step_s: float | None = None  # of each step, whatever is in it; None: by a cost table
