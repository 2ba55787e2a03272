"""The instances that the driver knows: handles, what they said when ready, who waits for them.

It decides nothing, and sends nothing by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import NamedTuple

from engine.messages import Ready
from scheduler.cluster.events import InstanceCapacity
from scheduler.types import InstanceId
from serving.cluster.handle import InstanceHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One instance as operators see it."""

    instance_id: InstanceId
    state: str  # up, draining, down
    model: str = ""
    dtype: str = ""
    device: str = ""
    num_assigned: int = 0  # requests that it owes an end
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # 0 to 1
    freeness: float = 0.0  # steps that its memory lasts


class Drained(NamedTuple):
    """How an instance ran empty."""

    seconds: float
    num_moved: int  # requests that were not awaited, and went on elsewhere


class Incarnation:
    """One instance from its start to its end."""

    def __init__(self, handle: InstanceHandle) -> None:
        self.handle = handle
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ready: Ready | None = None
        self.is_draining = False  # it gets nothing new, and so will those that follow a loss
        self.is_empty = asyncio.Event()  # while it drains: it has nothing any more, or is gone

    async def is_empty_within(self, seconds: float) -> bool:
        """Wait until it has nothing any more, for so long at most; return whether it has not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.is_empty.wait()
        return self.is_empty.is_set()


def capacity_of(ready: Ready) -> InstanceCapacity:
    return InstanceCapacity(
        max_num_running=ready.max_num_running,
        max_num_waiting_tokens=ready.max_num_waiting_tokens,
        max_model_len=ready.max_model_len,
        num_blocks=ready.geometry.num_blocks,
        block_size=ready.geometry.block_size,
    )
