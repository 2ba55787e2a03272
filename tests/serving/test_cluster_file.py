"""A cluster file: what it means, and that each mistake in it is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import machine
from serving import cluster_file
from serving.cluster_file import MAX_INSTANCES, read_cluster_file
from serving.config import ServeFlags
from serving.errors import UserError
from serving.instances import check_cluster_flags, read_cluster
from serving.start import make_config

WHOLE = """
model: smollm2-135m
instances:
  - count: 2
    dtype: bfloat16
    device: cpu
    kv_memory: 1GiB
    threads: 1
    max_num_running: 32
    cpus: 1
    gpus: 0
    memory: 2GiB
    resources: {fast_disk: 1}
    labels: {gpu_type: A100}
    devices: 1
  - count: 1
    dtype: float32
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def config_of(path, **flags):
    asked = ServeFlags(cluster=path, **flags)
    cluster, model = read_cluster(asked, None)
    return make_config(asked, model or "m", Path("models/m"), port=1, cluster=cluster)


def test_what_a_file_says(written):
    config = config_of(written(WHOLE), max_num_running=8, threads=3)
    first, second, third = config.instances
    assert first is second
    engine, placement = first.engine, first.placement
    assert (engine.dtype, engine.device, engine.kv_memory_bytes) == ("bfloat16", "cpu", 1 << 30)
    assert (engine.num_threads, engine.max_num_running) == (1, 32)
    assert (placement.num_cpus, placement.num_gpus, placement.memory_bytes) == (1, 0, 2 << 30)
    assert placement.resources == (("fast_disk", 1.0),)
    assert placement.labels == (("gpu_type", "A100"),)
    assert placement.num_devices == 1
    # What a group does not say is as on the command line.
    assert (third.engine.dtype, third.engine.max_num_running) == ("float32", 8)
    assert third.engine.num_threads == 3
    assert engine.model_folder.is_absolute(), "an actor stands in another folder"
    assert config.num_instances == 3
    assert config.instance(7) is third, "later ones are as the last"


def test_labels_that_ray_takes(written):
    labels = {"gpu_type": "A100", "ray.io/accelerator-type": "H100", "a.b-c/d_e": "", "n": "1.5"}
    text = f"instances: [{{labels: {json.dumps(labels)}}}]"
    placement = config_of(written(text)).instances[0].placement
    assert dict(placement.labels) == labels


def test_bounds_follow_the_instances(written):
    config = config_of(written(WHOLE), max_num_running=8, max_num_waiting=10)
    limits = config.admission
    assert (limits.max_num_running, limits.max_num_waiting) == (72, 10)
    assert limits.max_num_streams == 2 * (72 + 10)
    fewer = config.admission_of([0])
    assert (fewer.max_num_running, fewer.max_num_streams) == (32, 84)
    assert config.admission_of([0, 1, 2, 5]).max_num_running == 80
    given = config_of(written(WHOLE), max_num_streams=7)
    assert given.admission_of(range(9)).max_num_streams == 7


def test_instances_of_one_machine_share_it():
    flags = ServeFlags(instances=3)
    engine = make_config(flags, "m", Path("m"), port=1).instances[2].engine
    assert engine.num_threads == max(1, machine.num_usable_cores() // 3)
    assert engine.kv_memory_bytes == machine.default_kv_bytes() // 3
    flags = ServeFlags(instances=3, threads=5, kv_memory="1MiB")
    engine = make_config(flags, "m", Path("m"), port=1).engine
    assert (engine.num_threads, engine.kv_memory_bytes) == (5, 1 << 20)
    fake = make_config(ServeFlags(instances=3), "fake", None, port=1).engine
    assert fake.kv_memory_bytes is None, "its memory is small as it is"
    alone = make_config(ServeFlags(), "m", Path("m"), port=1).engine
    assert (alone.num_threads, alone.kv_memory_bytes) == (None, None)


def test_nodes_of_a_cluster_are_not_shared_out(written):
    text = "instances: [{count: 2, cpus: 3}, {gpus: 0.5, device: 'cuda:0'}, {device: cuda}]"
    config = config_of(written(text), ray_address="10.0.0.1:6379")
    first, _, third, fourth = config.instances
    assert (first.engine.num_threads, first.engine.kv_memory_bytes) == (3, None)
    assert third.engine.num_threads is None
    assert [spec.placement.num_gpus for spec in (first, third, fourth)] == [0, 0.5, 1]


def test_ray_is_for_several():
    assert not ServeFlags().uses_ray
    for flags in (
        ServeFlags(instances=2),
        ServeFlags(ray_address="a:1"),
        ServeFlags(cluster=Path()),
    ):
        assert flags.uses_ray


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("", "is empty", "instances:"),
        ("a: [", "line 1, column 5: while parsing a flow node", "instances:"),
        ("a: 1\n b: 2", "line 2, column 3: mapping values are not allowed here", ""),
        ("--- a\n--- b", "expected a single document", ""),
        ("x: !!python/name:os.system", "could not determine a constructor", ""),
        ("x: 2024-99-99", "month must be", ""),
        ("x: \x00", "special characters are not allowed", ""),
        ("{[a]: 1}", "unhashable key", ""),
        ("- a", "Expected `object`, got `array`", ""),
        ("modl: x", "unknown field `modl`", "the file may say: model, instances"),
        ("model: x", "missing required field `instances`", "the file may say: model, instances"),
        ("instances: []", "`$.instances`", "a list of groups"),
        ("instances: [3]", "`$.instances[0]`", "a list of groups"),
        ("instances: [{cout: 2}]", "field `cout` - at `$.instances[0]`", "may say: count, model"),
        ("instances: [{count: 0}]", "`$.instances[0].count`", "give `count` a whole number"),
        ("instances: [{count: two}]", "Expected `int`, got `str`", "give `count` a whole number"),
        ("instances: [{count: true}]", "Expected `int`, got `bool`", ""),
        ("instances:\n- {}\n- {count: 1, count: 2}", "line 3, column 14: 'count' stands", ""),
        ("instances: [{dtype: int8}]", "Invalid enum value 'int8'", "float32 or bfloat16"),
        ("instances: [{gpus: .nan}]", "`$.instances[0].gpus`", "a number, 0 or more"),
        ("instances: [{resources: {a: .inf}}]", ".resources[...]`", "{fast_disk: 1}"),
        ("instances: [{labels: {a: 1}}]", "Expected `str`, got `int`", "quote what looks like"),
        ("instances: [{labels: {a b: c}}]", "$.instances[0].labels: 'a b' is no name", "letters"),
        ("instances: [{}, {labels: {a: b@c}}]", "$.instances[1].labels.a: 'b@c' is no label", ""),
        ("instances: [{labels: {a: '!b'}}]", "$.instances[0].labels.a: '!b' is no label", ""),
        (f"instances: [{{labels: {{a: {'b' * 64}}}}}]", "is no label", "63 at most"),
        ("instances: [{resources: {CPU: 1}}]", "$.instances[0].resources: CPU", "as `cpus`"),
        ("instances: [{device: 'cuda:7x'}]", "at `$.instances[0].device`", "such as cuda:0"),
        ("instances: [{device: tpu}]", "at `$.instances[0].device`", "cpu, cuda or"),
        ("instances: [{kv_memory: lots}]", "$.instances[0].kv_memory: 'lots' is not a size", ""),
        ("instances: [{}, {memory: 0B}]", "$.instances[1].memory: 0B is nothing", ""),
        ("instances: [{kv_memory: 0.5}]", "Expected `int | str | null`", "such as 4GiB"),
        ("instances: [{max_num_running: 600}]", "more than the 512 tokens of a step", ""),
        (f"instances: [{{count: {MAX_INSTANCES}}}, {{}}]", "are too many", "at most 256"),
        ("model: a\ninstances: [{model: b}]", "instances[0].model is b, and model says a", "one"),
        ("instances: [{model: a}, {model: b}]", "instances[1].model is b", "serve one model"),
    ],
)
def test_a_mistake_is_named_with_its_place(written, text, cause, remedy):
    path = written(text)
    with pytest.raises(UserError) as error:
        config_of(path)
    assert error.value.cause.startswith(str(path))
    assert cause in error.value.cause
    assert remedy in error.value.remedy
    assert "\n" not in error.value.cause + error.value.remedy


def test_a_file_that_cannot_be_read(tmp_path, written, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        read_cluster_file(tmp_path / "none.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match="is not text"):
        read_cluster_file(tmp_path / "bytes")
    monkeypatch.setattr(cluster_file, "_MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="is larger than 10 bytes"):
        read_cluster_file(written(WHOLE))


def test_every_field_is_explained():
    fields = {name for names in cluster_file._PLACES.values() for name in names}
    assert set(cluster_file._VALUES) == fields


def test_the_model_is_named_once(written):
    flags = ServeFlags(cluster=written(WHOLE))
    assert read_cluster(flags, None)[1] == "smollm2-135m"
    assert read_cluster(flags, "smollm2-135m")[1] == "smollm2-135m"
    with pytest.raises(UserError, match="model is smollm2-135m, and the command line says other"):
        read_cluster(flags, "other")
    assert read_cluster(ServeFlags(), "other") == (None, "other")


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (ServeFlags(instances=0), "--instances 0"),
        (ServeFlags(instances=257), "--instances 257"),
        (ServeFlags(instances=2, cluster=Path("f")), "both say how many"),
        (ServeFlags(ray_address=" "), "--ray-address is empty"),
        (ServeFlags(dispatch="dice"), "--dispatch dice is unknown"),
        (ServeFlags(continuation_timeout=float("nan")), "--continuation-timeout nan"),
        (ServeFlags(fake_step=0.1), "--fake-step needs --fake"),
        (ServeFlags(fake=True, fake_step=-1.0), "--fake-step -1"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, cause):
    with pytest.raises(UserError, match=cause) as error:
        check_cluster_flags(flags)
    assert error.value.remedy
