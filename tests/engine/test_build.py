"""How an engine is sized from its configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.build import build_engine
from engine.config import EngineConfig
from engine.startup import CannotStart, StartupTimes
from serving.progress import NoProgress

FAKE = EngineConfig(model_name="fake", model_folder=None)


def ready(config: EngineConfig):
    return build_engine(config, StartupTimes(NoProgress()), lambda _: None)[1]


def test_the_checksum_executor_has_the_kv_memory_that_it_is_given():
    assert ready(replace(FAKE, kv_memory_bytes=64_000)).geometry.num_tokens == 8_000
    assert ready(FAKE).geometry.num_tokens == 262_144


def test_a_window_is_no_longer_than_the_kv_memory():
    assert ready(replace(FAKE, kv_memory_bytes=64_000)).max_model_len == 8_000
    assert ready(replace(FAKE, kv_memory_bytes=64_000, max_model_len=50)).max_model_len == 50


def test_kv_memory_without_room_for_a_block_is_refused():
    with pytest.raises(CannotStart, match="127 bytes holds no block of 128 bytes"):
        ready(replace(FAKE, kv_memory_bytes=127))
