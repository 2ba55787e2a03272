"""The benches of the engine: that they measure what they say, on a model small enough to count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.bench import limits, profile
from engine.models.registry import load_model, read_config
from engine.work import Shares, Work
from serving.progress import NoProgress
from tests.tiny_llama import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_the_work_of_a_step_is_that_of_its_weights_and_keys(folder: Path) -> None:
    """Hidden 64, MLP 112, 4 heads of 16, 3 layers, 131 tokens: counted by hand."""
    config, shape = read_config(folder), load_model(folder, "float32").shape
    qkv, out, mlp, head = 64 * 192, 64 * 64, 3 * 64 * 112, 64 * 131
    matrices = 3 * (qkv + out + mlp) + head
    token_bytes = 2 * 3 * 64 * 4
    found = Work.of(config, shape, batch=2, context=10)
    assert found.num_bytes == 4 * matrices + 2 * 11 * token_bytes
    assert found.num_flops == 2 * 2 * matrices + 2 * 11 * 4 * 64 * 3
    found = Work.of(config, shape, num_tokens=5)
    all_tokens, last = 3 * qkv + 2 * (out + mlp), out + mlp + head
    assert found.num_bytes == 4 * matrices + 5 * token_bytes
    assert found.num_flops == 2 * (5 * all_tokens + last) + 15 * 4 * 64 * 3
    shares = Shares.of(config, shape)
    assert shares == (last / all_tokens, 2 * 64 * 3 / all_tokens, token_bytes / (4 * matrices))


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_limits_say_the_share_of_the_floor(
    folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:
        monkeypatch.setenv("HOCKET_KERNELS", kernels)
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_GEMM_SIZE", 64)
    choices = limits.Choices(batch=(1, 3), context=20, chunk=8, rounds=2)
    report = limits.main(folder, "float32", choices, NoProgress())
    assert len(re.findall(r"GB/s|GFLOP/s", report)) == 2
    assert len(re.findall(r"^(decode|chunk).*\d+%$", report, re.MULTILINE)) == 3


def test_a_profile_is_whole_and_its_trace_can_be_opened(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    choices = profile.Choices(batch=(1, 3), context=20, steps=6, temperature=0.7, trace=path)
    report = profile.main(folder, "float32", choices, NoProgress())
    rows = re.findall(r"^\d+ .*%$", report, re.MULTILINE)
    assert [row.split()[0] for row in rows] == ["1", "3"]
    for row in rows:
        _, step, *phases, _ = row.split()
        assert float(step) == pytest.approx(sum(map(float, phases)), abs=0.02)
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["cat"] for event in events} == set(profile.PHASES) - {"other"}
    # All slices but the last are one call, in each of five steps.
    assert sum(event["name"] == "forward" for event in events) == 2 * 5
