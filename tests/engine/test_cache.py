"""KV memory as a tensor: what plans say of blocks is done to these blocks and to no others."""

from __future__ import annotations

import torch

from engine.kv.cache import KVCache
from engine.models.slices import ModelShape
from scheduler.instance.plan import BlockCopy
from scheduler.kv.blocks import BlockGroup
from tests.factories import make_geometry

SHAPE = ModelShape(
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=11,
    max_model_len=64,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


def make_cache() -> tuple[KVCache, torch.Tensor]:
    """Return a cache full of numbers, and a copy of them."""
    cache = KVCache(SHAPE, make_geometry(num_blocks=6))
    cache._kv.copy_(torch.randn(cache._kv.shape, generator=torch.Generator().manual_seed(0)))
    return cache, cache._kv.clone()


def test_only_the_first_tokens_of_a_block_are_copied_in_all_layers():
    cache, before = make_cache()
    cache.copy((BlockCopy(source=4, target=1, num_tokens=3),))
    assert torch.equal(cache._kv[1, :, :3], before[4, :, :3])
    assert torch.equal(cache._kv[1, :, 3:], before[1, :, 3:])
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(cache._kv[others], before[others])


def test_copies_are_made_in_order():
    cache, before = make_cache()
    cache.copy((BlockCopy(0, 1, 4), BlockCopy(1, 2, 2)))
    assert torch.equal(cache._kv[2, :, :2], before[0, :, :2])


def test_a_cleared_group_is_zero_and_its_neighbours_are_not():
    cache, before = make_cache()
    cache._kv[2] = torch.nan
    cache.clear((BlockGroup(2, 2), BlockGroup(5, 1)))
    assert not cache._kv[[2, 3, 5]].any()
    assert torch.equal(cache._kv[[0, 1, 4, 6]], before[[0, 1, 4, 6]])


def test_the_scratch_block_is_no_requests():
    cache, _ = make_cache()
    assert cache.scratch_block == cache.geometry.num_blocks
    assert len(cache._kv) == cache.geometry.num_blocks + 1
