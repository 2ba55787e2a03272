"""What each instance of a server is: from the flags and the cluster file, before anything starts.

It reads no model and starts nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine import machine
from engine.config import EngineConfig
from scheduler.cluster.dispatch import DISPATCH_POLICIES
from serving.cluster.placement import Placement
from serving.cluster_file import MAX_INSTANCES, ClusterFile, InstanceGroup, read_cluster_file
from serving.config import InstanceSpec, ServeFlags, parse_bytes
from serving.errors import UserError

_HEADROOM_NEEDS = ("freeness", "priority")
_ONE_MODEL = "all instances of one server serve one model; start another server for another model"


def check_cluster_flags(flags: ServeFlags) -> None:
    """Raise UserError for values that cannot work."""
    if not 1 <= flags.instances <= MAX_INSTANCES:
        raise UserError(
            f"--instances {flags.instances} is not possible", f"choose 1 to {MAX_INSTANCES}"
        )
    if flags.cluster is not None and flags.instances != 1:
        raise UserError(
            "--instances and --cluster both say how many instances there are",
            "leave --instances out, and write `count` in the file",
        )
    if flags.ray_address is not None and not flags.ray_address.strip():
        raise UserError("--ray-address is empty", "give HOST:PORT of the head, or leave it out")
    if flags.dispatch not in DISPATCH_POLICIES:
        raise UserError(
            f"--dispatch {flags.dispatch} is unknown", f"choose {', '.join(DISPATCH_POLICIES)}"
        )
    if not flags.continuation_timeout >= 0:
        raise UserError(
            f"--continuation-timeout {flags.continuation_timeout} makes no sense",
            "it must be 0 or more",
        )
    if flags.priority_headroom > 0 and (flags.dispatch, flags.scheduling_policy) != _HEADROOM_NEEDS:
        raise UserError(
            "--priority-headroom needs --dispatch freeness and --scheduling-policy priority",
            "add them, or leave it out",
        )
    if flags.fake_step is not None:
        if not flags.fake:
            raise UserError("--fake-step needs --fake", "a model's steps take what they take")
        if not 0 <= flags.fake_step <= 60:
            raise UserError(
                f"--fake-step {flags.fake_step} makes no sense", "give seconds, 0 to 60"
            )


def read_cluster(flags: ServeFlags, model: str | None) -> tuple[ClusterFile | None, str | None]:
    """Return the cluster file, if one is named, and the model to serve. Raises UserError."""
    if flags.cluster is None:
        return None, model
    cluster = read_cluster_file(flags.cluster)
    named = [("the command line", model), ("model", cluster.model)]
    named += [(f"instances[{n}].model", group.model) for n, group in enumerate(cluster.instances)]
    given = [(where, name) for where, name in named if name is not None]
    for where, name in given[1:]:
        if name != given[0][1]:
            raise UserError(
                f"{flags.cluster}: {where} is {name}, and {given[0][0]} says {given[0][1]}",
                _ONE_MODEL,
            )
    return cluster, given[0][1] if given else None


def instance_specs(
    flags: ServeFlags, cluster: ClusterFile | None, engine: EngineConfig
) -> tuple[InstanceSpec, ...]:
    """Return what each instance is, by number; `engine` is what the flags say of all of them.

    Raises UserError.
    """
    if not flags.uses_ray:
        return (InstanceSpec(engine=engine),)
    engine = replace(  # an actor stands in another folder
        engine,
        model_folder=_absolute(engine.model_folder),
        decision_log=_absolute(engine.decision_log),
    )
    groups = [InstanceGroup(count=flags.instances)] if cluster is None else cluster.instances
    num_instances = sum(group.count for group in groups)
    specs: list[InstanceSpec] = []
    for at, group in enumerate(groups):
        where = f"{flags.cluster}: $.instances[{at}]"
        settings = _engine(engine, group, where)
        if flags.ray_address is None:
            settings = _shared_machine(settings, num_instances)
        elif settings.num_threads is None and group.cpus >= 1:
            settings = replace(settings, num_threads=int(group.cpus))
        spec = InstanceSpec(engine=settings, placement=_placement(group, settings, where))
        specs += [spec] * group.count
    return tuple(specs)


def _engine(engine: EngineConfig, group: InstanceGroup, where: str) -> EngineConfig:
    """Return the settings of a group: its own, and those of the flags where it has none."""
    kv_memory_bytes = _bytes(group.kv_memory, f"{where}.kv_memory") or engine.kv_memory_bytes
    max_num_running = group.max_num_running or engine.max_num_running
    if max_num_running > engine.max_num_batched_tokens:
        raise UserError(
            f"{where}.max_num_running {max_num_running} is more than the "
            f"{engine.max_num_batched_tokens} tokens of a step, and each computes one",
            "lower it, or raise --max-num-batched-tokens",
        )
    return replace(
        engine,
        dtype=group.dtype or engine.dtype,
        device=group.device or engine.device,
        kv_memory_bytes=kv_memory_bytes,
        num_threads=group.threads or engine.num_threads,
        max_num_running=max_num_running,
        max_model_len=group.max_model_len or engine.max_model_len,
    )


def _shared_machine(engine: EngineConfig, num_instances: int) -> EngineConfig:
    """Share out what a single instance would take of this machine by default."""
    if engine.num_threads is None:
        num_threads = max(1, machine.num_usable_cores() // num_instances)
        engine = replace(engine, num_threads=num_threads)
    is_default_kv = engine.kv_memory_bytes is None and engine.model_folder is not None
    if is_default_kv and engine.device == "cpu":  # on a GPU it is what is free there
        engine = replace(engine, kv_memory_bytes=machine.default_kv_bytes() // num_instances)
    return engine


def _placement(group: InstanceGroup, engine: EngineConfig, where: str) -> Placement:
    num_gpus = group.gpus
    if num_gpus is None:
        num_gpus = 1.0 if engine.device.startswith("cuda") else 0.0
    return Placement(
        num_cpus=group.cpus,
        num_gpus=num_gpus,
        memory_bytes=_bytes(group.memory, f"{where}.memory") or 0,
        resources=tuple(sorted(group.resources.items())),
        labels=tuple(sorted(group.labels.items())),
        num_devices=group.devices,
    )


def _bytes(size: int | str | None, where: str) -> int | None:
    if not isinstance(size, str):
        return size
    try:
        num_bytes = parse_bytes(size)
    except ValueError as error:
        raise UserError(f"{where}: {error}", "write a number and a unit") from error
    if num_bytes < 1:
        raise UserError(f"{where}: {size} is nothing", "write a number and a unit")
    return num_bytes


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
