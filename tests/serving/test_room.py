"""What an instance asks of a node, what nodes have, and how the lack of it is put."""

from __future__ import annotations

import pytest

from serving.cluster.placement import Placement
from serving.cluster.ray.room import bundle, fits, lack, options

GIB = 1 << 30
SMALL = {
    "NodeID": "s",
    "Resources": {
        "CPU": 4.0,
        "memory": 8.0 * GIB,
        "node:10.0.0.1": 1.0,
        "object_store_memory": 1.0,
    },
    "Labels": {"ray.io/node-id": "x"},
}
LARGE = {
    "NodeID": "l",
    "Resources": {"CPU": 64.0, "GPU": 4.0, "memory": 64.0 * GIB, "disk": 1.0},
    "Labels": {"gpu_type": "A100", "ray.io/node-id": "y"},
}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, True),
        ({"num_cpus": 64}, True),
        ({"num_cpus": 64.5}, False),
        ({"num_gpus": 1, "num_devices": 4}, True),
        ({"num_gpus": 1, "num_devices": 5}, False),
        ({"memory_bytes": 64 * GIB}, True),
        ({"memory_bytes": 65 * GIB}, False),
        ({"resources": (("disk", 1.0),), "labels": (("gpu_type", "A100"),)}, True),
        ({"labels": (("gpu_type", "H100"),)}, False),
        ({"resources": (("tape", 0.5),)}, False),
    ],
)
def test_a_node_holds_what_it_has(asked, expected):
    assert fits(Placement(**asked), [SMALL, LARGE]) is expected


def test_one_node_has_to_hold_all_of_it():
    nodes = [SMALL, {**LARGE, "Resources": {"GPU": 4.0}}]
    assert not fits(Placement(num_cpus=1, num_gpus=1), nodes)


def test_what_is_free_counts_where_it_is_known():
    placement = Placement(num_gpus=2)
    assert fits(placement, [SMALL, LARGE], {"l": {"GPU": 2.0}})
    assert not fits(placement, [SMALL, LARGE], {"l": {"GPU": 1.0}, "s": {"CPU": 4.0}})
    assert not fits(placement, [SMALL, LARGE], {})


def test_the_lack_names_what_is_asked_and_what_there_is():
    placement = Placement(num_gpus=1, num_devices=8, labels=(("gpu_type", "A100"),))
    assert lack(placement, [SMALL, LARGE], "at all") == (
        "no node has 8 times 1 GPU, gpu_type=A100 at all: there is 4 CPU, 8.0 GiB of memory; "
        "64 CPU, 4 GPU, 1 disk, 64.0 GiB of memory, gpu_type=A100"
    )
    assert lack(Placement(), [], "free") == "no node has nothing free: there is no node"
    assert lack(placement, [SMALL] * 9, "free").endswith("; 5 more")


def test_rays_words_for_it():
    placement = Placement(num_cpus=2, num_gpus=0.5, memory_bytes=10, resources=(("disk", 1.0),))
    assert bundle(placement) == {"CPU": 2, "GPU": 0.5, "memory": 10.0, "disk": 1.0}
    assert bundle(Placement()) == {}
    assert options(Placement(labels=(("zone", "b"),))) == {
        "num_cpus": 0,
        "num_gpus": 0,
        "memory": None,
        "resources": {},
        "label_selector": {"zone": "b"},
    }
