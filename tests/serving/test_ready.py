"""The ready block of one instance and of several, and whose decision log is whose."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from engine.config import EngineConfig
from engine.messages import Ready
from serving.cluster.backend import own_log
from serving.config import ServeFlags
from serving.ready import ready_block
from serving.start import make_config
from tests.factories import make_geometry

READY = Ready("m", "float32", "cpu", 64, make_geometry())
SESSION = {"version": "2.60", "address": "10.0.0.1:6379", "is_local": True, "logs": "/tmp/logs"}


def lines_of(readies, session=None, **flags):
    config = make_config(ServeFlags(**flags), "m", None, port=8000)
    config = replace(config, admin_port=flags.get("admin_port"))
    block = ready_block(config, readies, {"total": 1.5}, session)
    pairs = [line.strip().split("  ", 1) for line in block.splitlines() if line.startswith("  ")]
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) > 1}


def test_one_instance():
    lines = lines_of({"instance-0": READY})
    assert lines["Serving"] == "m (float32, cpu) at http://127.0.0.1:8000/v1"
    assert not {"Instances", "Ray", "Operate"} & set(lines)


def test_several_instances():
    other = msgspec.structs.replace(READY, dtype="bfloat16", max_model_len=48)
    readies = {"instance-0": READY, "instance-1": other, "instance-2": other}
    lines = lines_of(readies, SESSION, instances=3, admin_port=8001, max_num_running=5)
    assert lines["Serving"].startswith("m (bfloat16 and float32, cpu) at ")
    assert lines["Instances"] == "1 float32 on cpu, 2 bfloat16 on cpu, dispatched by freeness"
    assert lines["Ray"] == "2.60, its own session    Logs: /tmp/logs"
    assert lines["Capacity"].startswith(f"{3 * READY.geometry.num_tokens:,} tokens of KV")
    assert lines["Limits"].startswith("48 tokens a request, 15 running, ")
    assert lines["Operate"] == "hocket status"


def test_a_cluster_and_another_admin_port():
    joined = SESSION | {"is_local": False}
    lines = lines_of({"instance-0": READY}, joined, ray_address="10.0.0.1:6379", admin_port=9)
    assert "the cluster at 10.0.0.1:6379" in lines["Ray"]
    assert lines["Operate"] == "hocket status --admin http://127.0.0.1:9"


def test_no_incarnation_writes_over_the_log_of_another(tmp_path):
    path = tmp_path / "log"
    engine = EngineConfig(model_name="m", model_folder=None, decision_log=path)
    written = []
    for number, incarnation in ((0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 1)):
        log = own_log(engine, number, incarnation).decision_log
        assert not log.exists()
        log.touch()
        written.append(log.name)
    assert written == [
        "log",
        "log.instance-1",
        "log.2",
        "log.instance-1.2",
        "log.3",
        "log.instance-1.3",
    ]
    assert own_log(engine, 0, 1).decision_log == path, "what the user named twice is refused"
    assert own_log(replace(engine, decision_log=None), 1, 1).decision_log is None
