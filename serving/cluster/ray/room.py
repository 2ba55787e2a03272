"""What an instance asks of a node against what nodes have, as Ray counts it. Asks nobody.

A node is what `ray.nodes()` says of it. Resources are logical: a node has what it was started with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.cluster.placement import Placement

_NUM_SHOWN = 4  # nodes in an error


def options(placement: Placement) -> dict[str, Any]:
    """Return what the actor asks of its node, as Ray's options name it."""
    return {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        "memory": placement.memory_bytes or None,
        "resources": dict(placement.resources),
        "label_selector": dict(placement.labels),
    }


def bundle(placement: Placement) -> dict[str, float]:
    """Return the same for one device, as Ray's resources name it."""
    asked = {
        "CPU": placement.num_cpus,
        "GPU": placement.num_gpus,
        "memory": float(placement.memory_bytes),
        **dict(placement.resources),
    }
    return {name: amount for name, amount in asked.items() if amount > 0}


def fits(
    placement: Placement,
    nodes: Sequence[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]] | None = None,
) -> bool:
    """Whether a node holds it: in what is `free` by node, or else if nothing else were there."""
    return any(
        _holds(node["Resources"] if free is None else free.get(node["NodeID"], {}), placement)
        and all(node.get("Labels", {}).get(name) == value for name, value in placement.labels)
        for node in nodes
    )


def lack(placement: Placement, nodes: Sequence[Mapping[str, Any]], when: str) -> str:
    """Return in words what is asked and what there is; `when` is `free` or `at all`."""
    asked = _words(bundle(placement), dict(placement.labels))
    if placement.num_devices > 1:
        asked = f"{placement.num_devices} times {asked}"
    has = [_words(node["Resources"], node.get("Labels", {})) for node in nodes[:_NUM_SHOWN]]
    if len(nodes) > _NUM_SHOWN:
        has.append(f"{len(nodes) - _NUM_SHOWN} more")
    return f"no node has {asked} {when}: there is {'; '.join(has) or 'no node'}"


def _holds(resources: Mapping[str, float], placement: Placement) -> bool:
    num = placement.num_devices
    asked = bundle(placement)
    return all(resources.get(name, 0.0) >= num * amount for name, amount in asked.items())


def _words(resources: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Return resources as people read them, without what Ray notes for itself."""
    words = [
        f"{amount / (1 << 30):.1f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "object_store"))
    ]
    words += [f"{name}={value}" for name, value in sorted(labels.items()) if "ray.io/" not in name]
    return ", ".join(words) or "nothing"
