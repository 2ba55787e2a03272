"""A small checksum instance whose requests and starts go wrong on demand, by their names.

Also a program, as `serving.instance` is: `python -P -m tests.serving.checksum_instance --fd N`.
"""

from __future__ import annotations

import os
import sys
import time

from engine.core import EngineCore
from engine.messages import Ready
from engine.models.errors import ModelFormatError
from engine.startup import CannotStart
from scheduler.request import InvariantError
from serving.instance import main
from tests.factories import make_executor, make_geometry, make_scheduler

PROGRAM = ("-m", "tests.serving.checksum_instance")
MAX_MODEL_LEN = 256


def go_wrong(name: str) -> str | None:
    """What happens when a request of this name is computed."""
    if name.startswith("poison"):
        return "forward"
    if name.startswith("breaks"):
        raise InvariantError("the device\nis lost")
    if name.startswith("exits"):
        print("its last words", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)
    if name.startswith("aborts"):
        os.abort()
    if name.startswith("hangs"):
        time.sleep(3600)
    return None


def build(config, times, emit):
    with times.phase("weights", "reading weights", 2):
        times.advance(1)
    match config.model_name:
        case "no-memory":
            raise CannotStart("there is not enough memory", "buy some")
        case "no-format":
            raise ModelFormatError("it is no model", "name another")
        case "raises":
            raise RuntimeError("a fault\nof ours")
        case "sleeps":
            time.sleep(3600)
        case "slow":
            time.sleep(0.4)
        case name:
            go_wrong(name)
    executor = make_executor(fault=lambda request_id, _: go_wrong(request_id))
    core = EngineCore(make_scheduler(max_num_waiting=2), executor, emit)
    return core, Ready("m", "checksum", "none", MAX_MODEL_LEN, make_geometry())


if __name__ == "__main__":
    main(build)
