"""What this process may use of the machine: memory and cores, cgroup limits respected."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

GIB = 1 << 30
KV_SHARE = 0.25  # of the memory limit, on a CPU
KV_CAP_BYTES = 4 * GIB
KV_SHARE_CUDA = 0.9  # of the free device memory, after the weights


def memory_limit_bytes() -> int:
    """Return the lowest of physical memory and the limits of the cgroups this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(text) for text in _cgroup_values("memory.max") if text.isdigit()]
    return min(limits)


def num_usable_cores() -> int:
    """Return the cores in the affinity mask, or fewer where a cgroup grants less time."""
    cores = len(os.sched_getaffinity(0))
    for text in _cgroup_values("cpu.max"):
        quota, period = text.split()
        if quota.isdigit():
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_kv_bytes() -> int:
    """KV memory on a CPU: a quarter of the memory limit, at most 4 GiB.

    Pages are taken when first written, so this bounds the use and is not spent at start.
    """
    return min(int(memory_limit_bytes() * KV_SHARE), KV_CAP_BYTES)


def _cgroup_values(name: str) -> list[str]:
    """Read a control file of this process's cgroup (v2) and of all its ancestors."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().split("::")[-1].lstrip("/")
    except OSError:
        return []
    folder = _CGROUP / own
    values = []
    for candidate in (folder, *folder.parents):
        if candidate == _CGROUP.parent:
            break
        try:
            values.append((candidate / name).read_text().strip())
        except OSError:
            continue
    return values
