"""Freeness: how many steps an instance's KV memory lasts (Llumnix, arXiv 2406.03243, algorithm 1).

F = (M - ΣV) / B, with memory counted in tokens. M is the memory. The virtual usage V of a running
request is what it holds, and of the first that waits what it demands; those of high priority add a
headroom that they share. B is the batch: each request takes a token a step. Negative means
overload.
"""

from __future__ import annotations

from scheduler.cluster.events import InstanceCapacity
from scheduler.load import InstanceView


def running_freeness(
    capacity: InstanceCapacity, view: InstanceView, num_headroom_blocks: int = 0
) -> float:
    """Return the steps that its memory lasts were it to run on as now; others that wait are 0."""
    num_blocks = view.num_free_blocks - view.num_head_blocks - num_headroom_blocks
    return _steps(capacity, num_blocks, view.num_running + bool(view.num_waiting))


def dispatch_freeness(
    capacity: InstanceCapacity,
    view: InstanceView,
    num_headroom_blocks: int = 0,
    num_sent: int = 0,
    num_sent_blocks: int = 0,
) -> float:
    """Return the steps for one that comes behind all that waits, as in the paper's artifact.

    So do those that were sent and are not in `view` yet.
    """
    num_demanded_blocks = capacity.num_blocks_of(view.num_waiting_tokens) + num_sent_blocks
    num_blocks = view.num_free_blocks - num_demanded_blocks - num_headroom_blocks
    return _steps(capacity, num_blocks, view.num_running + view.num_waiting + num_sent)


def _steps(capacity: InstanceCapacity, num_blocks: int, batch: int) -> float:
    return num_blocks * capacity.block_size / max(1, batch)
