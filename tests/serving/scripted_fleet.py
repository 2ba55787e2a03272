"""A fleet whose driver and instances do what a test tells them: no process, no waiting."""

from __future__ import annotations

import asyncio
from collections import namedtuple

from engine.messages import Ready
from serving.cluster.fleet import Fleet
from serving.cluster.members import Members
from serving.errors import UserError
from tests.factories import make_geometry

Status = namedtuple(
    "Status",
    "instance_id state num_assigned num_running num_waiting kv_usage",
    defaults=(0, 0, 0.0),
)
Drained = namedtuple("Drained", "seconds num_moved")


class Instance:
    """A handle that is told when its start is over."""

    def __init__(self, name, incarnation, fault=None, ready=None):
        self.instance_id = name
        self.incarnation = incarnation
        self.pid = 100 + incarnation
        self.lost = asyncio.get_running_loop().create_future()
        self.may_start = asyncio.Event()
        self.fault = fault
        self.ready = ready or Ready("m", "float32", "cpu", 64, make_geometry())
        self.is_stopped = False

    async def start(self, on_report):
        await self.may_start.wait()
        if self.fault is not None:
            raise self.fault
        return self.ready

    async def stop(self):
        self.is_stopped = True


class ScriptedDriver:
    """Notes what is asked of it, in order; a drain lasts until the test lets it end."""

    def __init__(self):
        self.draining = False
        self.log = []
        self.handles = {}
        self.up = {}  # by id: up or draining
        self.drained = set()  # and so will be what follows a loss
        self.loads = {}  # requests of each
        self.dies_at_once = set()  # when they come up next
        self.holds_drains = False
        self.may_drain = asyncio.Event()

    async def start(self, handle):
        self.log.append(f"start {handle.instance_id} {handle.incarnation}")
        self.handles[handle.instance_id] = handle
        ready = await handle.start(None)
        self.log.append(f"up {handle.instance_id}")
        is_drained = handle.instance_id in self.drained
        self.up[handle.instance_id] = "draining" if is_drained else "up"
        if handle.instance_id in self.dies_at_once:
            self.dies_at_once.remove(handle.instance_id)
            self.lose(handle.instance_id)
        return ready

    def lose(self, name):
        del self.up[name]
        self.handles[name].lost.set_result("why")

    async def until_lost(self, handle):
        return await asyncio.shield(handle.lost)

    def expect_up(self, at_s):
        pass

    async def drain_instance(self, name, timeout_s):
        self.log.append(f"drain {name}")
        self.drained.add(name)
        if name in self.up:
            self.up[name] = "draining"
        if self.holds_drains:
            await self.may_drain.wait()
        self.loads.pop(name, None)
        return Drained(0.5, 0)

    async def remove_instance(self, name):
        self.log.append(f"remove {name}")
        self.drained.discard(name)
        self.up.pop(name, None)
        handle = self.handles.pop(name, None)
        if handle is not None:
            await handle.stop()

    def instances(self):
        return [
            Status(name, self.up.get(name, "down"), self.loads.get(name, 0))
            for name in self.handles
        ]


class ScriptedFleet:
    """Starts `num` instances; `faults` and `readies` are by (number, incarnation)."""

    def __init__(self, num=2, *, max_num=8, faults=None, readies=None, holds=()):
        self.driver = ScriptedDriver()
        self.numbers = []
        self.instances = {}  # by number: the last incarnation
        self.faults = dict(faults or {})
        self.readies = dict(readies or {})
        self.holds = set(holds)  # numbers of those that start when they are told to
        self.fleet = Fleet(
            self.driver,
            Members(self.driver, self._make, drain_timeout_s=30, sleep=lambda _: asyncio.sleep(0)),
            num,
            max_num_instances=max_num,
            on_numbers=lambda numbers: self.numbers.append(list(numbers)),
        )

    def _make(self, number, incarnation):
        key = (number, incarnation)
        made = Instance(
            f"instance-{number}", incarnation, self.faults.get(key), self.readies.get(key)
        )
        if number not in self.holds:
            made.may_start.set()
        self.instances[number] = made
        return made

    async def __aenter__(self):
        await self.fleet.start()
        self.driver.log.clear()
        return self

    async def __aexit__(self, *_):
        await self.fleet.stop()

    def states(self):
        return {shown["instance"]: shown["state"] for shown in self.fleet.state()["instances"]}

    async def until_done(self):
        """Wait for the end of the change; return what it was."""
        await self.until(lambda: self.fleet.state()["change"] is None)
        return self.fleet.state()["last_change"]

    async def until(self, is_so):
        async with asyncio.timeout(5):
            while not is_so():  # noqa: ASYNC110 (it comes by itself)
                await asyncio.sleep(0)


def no_memory():
    return UserError("no memory", "buy some")
