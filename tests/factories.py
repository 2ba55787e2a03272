"""Small makers of specs, schedulers and executors, so that a test names only what it is about."""

from __future__ import annotations

from collections.abc import Sequence

from engine.fake import ChecksumExecutor
from scheduler.config import InstanceConfig
from scheduler.instance.scheduler import InstanceScheduler
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


def make_scheduler(num_blocks: int = 64, **settings) -> InstanceScheduler:
    return InstanceScheduler(make_config(**settings), make_geometry(num_blocks))


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
