"""The result file: all records of a run, its summary, and the facts that it takes to believe it.

Owns the format. Times of records, and lags, are whole microseconds in columns; those of events are
differences from the one before, so that a gap is a few characters. Nothing else is rounded. A
column that holds only empty values is left out.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from loadgen.compare.arms import Health
from loadgen.compare.statistics import Comparison
from loadgen.metrics import Summary
from loadgen.shown import command_line
from loadgen.types import LoadError, Record, Run

FORMAT = "hocket-loadgen-run"
COMPARISON_FORMAT = "hocket-loadgen-comparison"
VERSION = 1

_TIMES = ("intended_at_s", "sent_at_s", "end_at_s")
_EVENTS = ("received_at_s", "stamped_at_s")
_SCALARS = tuple(f for f in fields(Run) if f.name not in ("records", "lags_s"))
_KINDS: dict[str, type | tuple[type, ...]] = {  # by annotation
    "str": str,
    "int": int,
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": bool,
    "dict[str, str]": dict,
    "list[float]": list,
}
_EMPTY: dict[str, Any] = {"str": "", "int": 0, "int | None": None, "float": 0, "list[float]": []}
_PACKAGES = ("hocket", "aiohttp", "numpy")


def write_json(path: Path, run: Run, summary: Summary) -> None:
    """Write a run whole or not at all. Raises LoadError."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "run": {field.name: getattr(run, field.name) for field in _SCALARS},
        "summary": asdict(summary),
        "lags_us": _microseconds(run.lags_s),
        "num_records": len(run.records),
        "records": _columns(run.records),
    }
    write_text(path, json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def write_comparison(
    path: Path,
    arms: Mapping[str, str],
    comparisons: Sequence[Comparison],
    healths: Mapping[str, Health],
    facts: Mapping[str, str],
) -> None:
    """Write what a comparison showed, whole or not at all. Raises LoadError."""
    document = {
        "format": COMPARISON_FORMAT,
        "version": VERSION,
        "arms": {name: {"name": arms[name], **asdict(health)} for name, health in healths.items()},
        "comparisons": [asdict(it) | {"verdict": it.verdict} for it in comparisons],
        "facts": dict(facts),
    }
    write_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises LoadError."""
    unfinished = path.with_name(path.name + ".part")
    try:
        # A lone surrogate becomes its escape, which is what JSON writes for it too.
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    except OSError as error:
        remedy = "name a file in a folder that exists and may be written"
        raise LoadError(f"cannot write {path}: {error.strerror}", remedy) from error


def read_json(path: Path) -> Run:
    """Read what `write_json` wrote; times of records to the microsecond. Raises LoadError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give the JSON file that an earlier run wrote"
        raise LoadError(f"cannot read {path}: {error.strerror}", remedy) from error
    except ValueError as error:
        raise _not_ours(path, "it is not JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _not_ours(path, f'it does not say "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        said = document.get("version")
        remedy = "read it with the release that wrote it, or run the load again"
        raise LoadError(f"{path} has version {said}; this one reads version {VERSION}", remedy)
    try:
        records = _records(document["records"], document["num_records"])
        for field in _SCALARS:
            _check(field, document["run"][field.name])
        return Run(records=records, lags_s=_seconds(document["lags_us"]), **document["run"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(path, f"a part is missing or malformed: {error}") from error


def _not_ours(path: Path, why: str) -> LoadError:
    return LoadError(f"{path} is no result file: {why}", "give the JSON file that a run wrote")


def _microseconds(values_s: Sequence[float]) -> list[int]:
    return [round(value * 1e6) for value in values_s]


def _seconds(values_us: Sequence[int]) -> tuple[float, ...]:
    return tuple(value / 1e6 for value in values_us)


def _deltas(times_s: Sequence[float]) -> list[int]:
    """Return the first time, then differences: of rounded times, so that no error adds up."""
    times_us = _microseconds(times_s)
    return times_us[:1] + [after - before for before, after in pairwise(times_us)]


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for field in fields(Record):
        name = field.name
        values = [getattr(record, name) for record in records]
        if name in _TIMES:
            values = _microseconds(values)
        elif name in _EVENTS:
            values = [_deltas(times_s) for times_s in values]
        if any(value != _EMPTY[str(field.type)] for value in values):
            columns[name] = values
    return columns


def _records(columns: Mapping[str, list[Any]], num_records: int) -> tuple[Record, ...]:
    values: dict[str, list[Any]] = {}
    for field in fields(Record):
        column = columns.get(field.name, [_EMPTY[str(field.type)]] * num_records)
        if len(column) != num_records:
            raise ValueError(f"{field.name} has {len(column)} values, not {num_records}")
        for value in column:
            _check(field, value)
        values[field.name] = column
    unknown = columns.keys() - values.keys()
    if unknown:
        raise ValueError(f"unknown columns {', '.join(sorted(unknown))}")
    for name in _TIMES:
        values[name] = list(_seconds(values[name]))
    for name in _EVENTS:
        values[name] = [list(_seconds(list(accumulate(deltas)))) for deltas in values[name]]
    rows = zip(*values.values(), strict=True)
    return tuple(Record(**dict(zip(values, row, strict=True))) for row in rows)


def _check(field: Field[Any], value: object) -> None:
    if not isinstance(value, _KINDS[str(field.type)]):
        raise TypeError(f"{field.name} holds {value!r:.40}")


def facts(command: Sequence[str] | None = None) -> dict[str, str]:
    """Collect what a reader needs to know of this machine; keys in a command are not shown."""
    return {
        "command": command_line(sys.argv if command is None else command),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_cpu_model()}, {_num_cpus()} in use",
        "load before": _load_average(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or "unknown"


def _num_cpus() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()}"


def _load_average() -> str:
    """Return how busy the machine was in the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
