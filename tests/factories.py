"""Small makers of specs, schedulers and executors, so that a test names only what it is about."""

from __future__ import annotations

from collections.abc import Sequence

from engine.fake import ChecksumExecutor
from scheduler.cluster.events import InstanceCapacity
from scheduler.config import InstanceConfig
from scheduler.costs import StepCosts
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.load import InstanceView
from scheduler.types import KVGeometry, RequestId, RequestSpec, SamplingParams

BLOCK_SIZE = 4
VOCAB_SIZE = 97


def make_spec(
    request_id: str = "r0",
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 8,
    **params,
) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params}),
    )


def make_geometry(num_blocks: int = 64, block_size: int = BLOCK_SIZE) -> KVGeometry:
    return KVGeometry(block_size=block_size, num_blocks=num_blocks, block_bytes=8 * block_size)


def make_config(**settings) -> InstanceConfig:
    return InstanceConfig(
        **{
            "max_model_len": 256,
            "max_num_batched_tokens": 16,
            "max_num_running": 8,
            **settings,
        }
    )


def make_scheduler(
    num_blocks: int = 64, costs: StepCosts | None = None, **settings
) -> InstanceScheduler:
    return InstanceScheduler(make_config(**settings), make_geometry(num_blocks), costs)


def make_executor(num_blocks: int = 64, max_num_rows: int = 8, **settings) -> ChecksumExecutor:
    return ChecksumExecutor(
        make_geometry(num_blocks),
        **{
            "max_num_rows": max_num_rows,
            "max_model_len": 256,
            "vocab_size": VOCAB_SIZE,
            **settings,
        },
    )


def make_capacity(**limits) -> InstanceCapacity:
    """An instance of 64 blocks of 4 slots that runs two requests, and has one more to spare."""
    return InstanceCapacity(
        **{
            "max_num_running": 2,
            "max_num_waiting_tokens": 1000,
            "max_model_len": 256,
            "num_blocks": 64,
            "block_size": BLOCK_SIZE,
            **limits,
        }
    )


def make_view(**facts) -> InstanceView:
    """The view of an instance that has nothing to do."""
    return InstanceView(
        **{
            "num_running": 0,
            "num_waiting": 0,
            "num_waiting_tokens": 0,
            "num_blocks": 64,
            "num_free_blocks": 64,
            "num_steps": 0,
            "num_computed_tokens": 0,
            "num_preemptions": 0,
            **facts,
        }
    )
