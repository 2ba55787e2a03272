"""Traces: each format by an example, slices by hand, and what is said of files that are wrong."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from loadgen.types import LoadError
from loadgen.workload.traces import Slice, TraceRequest, cut_trace, has_blocks, read_trace

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:47.6805900,879,0
2023-11-16 18:16:46.6805900,100,10
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 02:00:01.009930+02:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
118,ChatGPT,417,0,417,Conversation log
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
    {"timestamp": 3500, "input_length": 1024, "output_length": 16, "hash_ids": [0, 3]},
    {"timestamp": 9000, "input_length": 10, "output_length": 1, "hash_ids": [4]},
]


@pytest.fixture
def trace_of(tmp_path):
    def read(content, name="trace.csv"):
        path = tmp_path / name
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return read_trace(path)

    return read


@pytest.fixture
def mooncake(trace_of):
    return trace_of("".join(json.dumps(row) + "\n" for row in MOONCAKE))


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_azure_2023(trace_of, name):
    trace = trace_of(AZURE_2023, name)
    assert [(it.num_prompt_tokens, it.num_output_tokens) for it in trace.requests] == [
        (374, 44),
        (396, 109),
        (100, 10),
    ]
    times = [it.at_s for it in trace.requests]
    assert times == pytest.approx([0.0, 4.314579, 60.0], abs=2e-6)  # microseconds, float seconds
    assert trace.num_failed == 1
    assert not has_blocks(trace)


def test_azure_2024_has_time_zones(trace_of):
    first, second = trace_of(AZURE_2024).requests
    assert second.at_s - first.at_s == pytest.approx(1.0)


def test_burstgpt(trace_of):
    trace = trace_of(BURSTGPT)
    assert trace.requests == (TraceRequest(0.0, 472, 18), TraceRequest(40.5, 1087, 230))
    assert trace.num_failed == 1


def test_mooncake(mooncake):
    assert mooncake.requests == (
        TraceRequest(0.0, 1100, 50, (0, 1, 2)),
        TraceRequest(2.5, 1024, 16, (0, 3)),
        TraceRequest(8.0, 10, 1, (4,)),
    )
    assert mooncake.block_tokens == 512
    assert has_blocks(mooncake)


def test_a_slice_is_in_the_time_of_the_trace_and_lasts_in_that_of_the_run(mooncake):
    part = cut_trace(mooncake, Slice(start_s=2.0, duration_s=12.1, speed=0.5))
    assert [it.at_s for it in part.requests] == [1.0, 12.0]
    part = cut_trace(mooncake, Slice(start_s=2.0, duration_s=12.0, speed=0.5))
    assert [it.at_s for it in part.requests] == [1.0]
    assert [it.at_s for it in cut_trace(mooncake, Slice(speed=4.0)).requests] == [0.0, 0.625, 2.0]
    assert len(cut_trace(mooncake, Slice(num_requests=2)).requests) == 2


def test_dividing_rounds_up_and_keeps_the_blocks(mooncake):
    part = cut_trace(mooncake, Slice(divisor=16))
    assert part.block_tokens == 32
    assert [it[1:] for it in part.requests] == [
        (69, 4, (0, 1, 2)),
        (64, 1, (0, 3)),
        (1, 1, (4,)),
    ]


def test_shortening_keeps_the_answer_and_whole_blocks(mooncake):
    part = cut_trace(mooncake, Slice(divisor=16, max_context=72))
    assert [it[1:] for it in part.requests] == [
        (64, 4, (0, 1)),
        (64, 1, (0, 3)),
        (1, 1, (4,)),
    ]
    assert part.num_shortened == 1
    assert cut_trace(mooncake, Slice(divisor=16, max_context=73)).num_shortened == 0


def test_without_blocks_a_prompt_is_shortened_to_the_token(trace_of):
    part = cut_trace(trace_of(AZURE_2023), Slice(max_context=400))
    assert [it[1:3] for it in part.requests] == [(356, 44), (291, 109), (100, 10)]
    assert part.num_shortened == 2


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "holds no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        (BURSTGPT.splitlines()[0] + "\n5,ChatGPT,472,0,490,x\n", "holds no request"),
        ("a,b,c\n1,2,3\n", "line 1: no known trace"),
        (AZURE_2023 + "yesterday,1,2\n", "line 6: Invalid isoformat"),
        (AZURE_2023 + "2023-11-16 18:17:00,1\n", "line 6: too few columns"),
        (AZURE_2023 + "2023-11-16 18:17:00,0,5\n", "line 6: a prompt needs a token"),
        (AZURE_2023 + "2023-11-16 18:17:00,1.5,5\n", "line 6: invalid literal"),
        (BURSTGPT + "nan,ChatGPT,4,1,5,x\n", "line 5: the time is not finite"),
        ('{"timestamp": 1}\n', "line 1: no field 'input_length'"),
        (json.dumps(MOONCAKE[0]) + "\n{oops\n", "line 2: Expecting"),
        (json.dumps(MOONCAKE[0] | {"hash_ids": [0]}), "line 1: 1 hash_ids do not make 1100 tokens"),
        (json.dumps(MOONCAKE[0] | {"hash_ids": ["a", "b", "c"]}), "not a whole number"),
        (json.dumps(MOONCAKE[0] | {"timestamp": "soon"}), "line 1: unsupported operand"),
        (json.dumps(MOONCAKE[0] | {"timestamp": 10**400}), "line 1: integer division result"),
        (json.dumps(MOONCAKE[0] | {"input_length": 10**22}), "more than 10,000,000 tokens"),
        (json.dumps(MOONCAKE[0] | {"output_length": 10**22}), "more than 10,000,000 tokens"),
        ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "line 1: nested too deeply"),
        (BURSTGPT + f"5,GPT-4,{10**22},1,5,x\n", "line 5: a length of more than"),
        (BURSTGPT + f"5,GPT-4,{10**400},1,5,x\n", "line 5: a length of more than"),
        (BURSTGPT + f"{10**400},GPT-4,1,1,5,x\n", "line 5: the time is not finite"),
        (BURSTGPT + "5,GPT\r-4,1,1,5,x\n", "line 5: new-line character"),
        (BURSTGPT + "5,GPT-4" + "x" * 140_000 + ",1,1,5,x\n", "line 5: field larger than"),
    ],
)
def test_wrong_files_are_named_with_the_line(trace_of, content, cause):
    with pytest.raises(LoadError) as caught:
        trace_of(content)
    assert cause in caught.value.cause
    assert "trace.csv" in caught.value.cause
    assert caught.value.remedy


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(LoadError, match=r"absent\.csv cannot be read: No such file"):
        read_trace(tmp_path / "absent.csv")
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(gzip.compress(AZURE_2023.encode())[:-12])
    with pytest.raises(LoadError, match="damaged gzip data"):
        read_trace(damaged)
    damaged.write_text(AZURE_2023)
    with pytest.raises(LoadError, match="after line 0: damaged gzip data"):
        read_trace(damaged)


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (Slice(start_s=9.0), "no request from 9 to inf s"),
        (Slice(start_s=3.0, duration_s=1.0), "no request from 3 to 4 s"),
        (Slice(divisor=0), "divided by 0"),
        (Slice(divisor=3), "divided by 3"),
        (Slice(speed=0.0), "no speed 0"),
        (Slice(speed=1e-320), "no speed 9.99"),
        (Slice(speed=math.inf), "no speed inf"),
    ],
)
def test_slices_that_cannot_be_are_named(mooncake, part, cause):
    with pytest.raises(LoadError) as caught:
        cut_trace(mooncake, part)
    assert cause in caught.value.cause


def test_lengths_without_blocks_may_be_divided_by_any_number(trace_of):
    part = cut_trace(trace_of(BURSTGPT), Slice(divisor=7))
    assert [it[1:3] for it in part.requests] == [(68, 3), (156, 33)]
    part = cut_trace(trace_of(BURSTGPT), Slice(divisor=1000))
    assert [it[1:3] for it in part.requests] == [(1, 1), (2, 1)]
