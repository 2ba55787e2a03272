"""Reads a cluster file: YAML that says which instances there are. See docs/cluster.md.

It checks form alone, and names the place of what is wrong. What the values mean, and what stands
where none is given, is decided in `serving.instances`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from serving.errors import UserError

MAX_INSTANCES = 256
MAX_COUNT = (1 << 31) - 1  # of anything that is counted
_MAX_FILE_BYTES = 256 << 10
_EXAMPLE = "write for example `instances: [{count: 2, device: cpu}]`; docs/cluster.md tells all"

_Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
_Amount = Annotated[float, Meta(ge=0, le=1e9)]
_Name = Annotated[str, Meta(min_length=1)]
_DEVICE = "^(cpu|cuda(:[0-9]{1,3})?)$"
# What Ray takes for labels: the rules of Kubernetes.
_LABEL_CHARS = "[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_NAME = re.compile(f"({_LABEL_CHARS}/)?{_LABEL_CHARS}")
_LABEL_VALUE = re.compile(f"({_LABEL_CHARS})?")
# What Ray counts under these names has fields of its own.
_NOT_CUSTOM = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}


class InstanceGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instances that are alike. None: as the flags of the command line say."""

    count: Annotated[int, Meta(ge=1, le=MAX_INSTANCES)] = 1
    model: _Name | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    device: Annotated[str, Meta(pattern=_DEVICE)] | None = None
    kv_memory: _Positive | str | None = None
    threads: _Positive | None = None
    max_num_running: _Positive | None = None
    max_model_len: _Positive | None = None
    cpus: _Amount = 0.0
    gpus: _Amount | None = None
    memory: _Positive | str | None = None
    resources: dict[_Name, _Amount] = {}
    labels: dict[_Name, str] = {}
    devices: _Positive = 1


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: _Name | None = None
    instances: Annotated[list[InstanceGroup], Meta(min_length=1)]


_PLACES = {
    "the file": ClusterFile.__struct_fields__,
    "a group of instances": InstanceGroup.__struct_fields__,
}
_COUNT, _SIZE = "a whole number, at least 1", "bytes, or a size such as 4GiB"
_VALUES = {
    "model": "a name or a path, as after `hocket serve`",
    "instances": "a list of groups, at least one",
    "count": f"a whole number, 1 to {MAX_INSTANCES}",
    "dtype": "auto, float32 or bfloat16",
    "device": "cpu, cuda or a CUDA device such as cuda:0",
    "kv_memory": _SIZE,
    "threads": _COUNT,
    "max_num_running": _COUNT,
    "max_model_len": _COUNT,
    "cpus": "a number, 0 or more",
    "gpus": "a number, 0 or more",
    "memory": _SIZE,
    "resources": "names with a number each, such as {fast_disk: 1}",
    "labels": "names with a text each, such as {gpu_type: A100}; quote what looks like a number",
    "devices": _COUNT,
}
_LABEL_REMEDY = "write letters, digits and `-_.` between them, 63 at most, such as {gpu_type: A100}"
_FIELD = re.compile(r"at `\$\.(?:instances\[\d+\]\.)?(\w+)")


def read_cluster_file(path: Path) -> ClusterFile:
    """Return what the file says. Raises UserError with the place of what is wrong."""
    # Most servers have no such file, and need no YAML.
    from serving.strict_yaml import YamlError, parsed

    try:
        value = parsed(_text(path))
    except YamlError as error:
        raise UserError(f"{path}{error.place}: {_one_line(error)}", _EXAMPLE) from error
    if value is None:
        raise UserError(f"{path} is empty", _EXAMPLE)
    try:
        read = msgspec.convert(value, ClusterFile, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}", _remedy(str(error))) from error
    for at, group in enumerate(read.instances):
        _check_names(group, f"{path}: $.instances[{at}]")
    num_instances = sum(group.count for group in read.instances)
    if num_instances > MAX_INSTANCES:
        raise UserError(
            f"{path}: {num_instances} instances are too many",
            f"one server has at most {MAX_INSTANCES}",
        )
    return read


def _check_names(group: InstanceGroup, where: str) -> None:
    """Raise UserError for what Ray would take for no label, or no resource of the user's."""
    for name, value in group.labels.items():
        if not _LABEL_NAME.fullmatch(name):
            raise UserError(f"{where}.labels: {name!r} is no name of a label", _LABEL_REMEDY)
        if not _LABEL_VALUE.fullmatch(value):
            raise UserError(f"{where}.labels.{name}: {value!r} is no label", _LABEL_REMEDY)
    for name in group.resources.keys() & _NOT_CUSTOM.keys():
        raise UserError(
            f"{where}.resources: {name} is no resource of your own",
            f"write it as `{_NOT_CUSTOM[name]}` of the group",
        )


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check --cluster") from error
    if len(data) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {_MAX_FILE_BYTES} bytes", _EXAMPLE)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text", _EXAMPLE) from None


def _remedy(message: str) -> str:
    """Return what may stand at the place that the message names."""
    if "unknown field" in message or "missing required field" in message:
        place = "a group of instances" if "$.instances[" in message else "the file"
        return f"{place} may say: {', '.join(_PLACES[place])}"
    field = _FIELD.search(message)
    return f"give `{field[1]}` {_VALUES[field[1]]}" if field else _EXAMPLE


def _one_line(what: object) -> str:
    return " ".join(str(what).split())
