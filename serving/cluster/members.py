"""The instances of a fleet, by number: how one joins, is drained, is renewed, leaves.

One `Supervisor` keeps each up. When this happens, and to which, is the fleet's to say.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from engine.messages import Ready
from scheduler.types import InstanceId
from serving.cluster.driver import ClusterDriver
from serving.cluster.handle import InstanceHandle
from serving.cluster.supervisor import Supervisor
from serving.errors import UserError

# The number of an instance, from 0, and of its incarnation, from 1.
MakeHandle = Callable[[int, int], InstanceHandle]
Say = Callable[[str], None]


class Members:
    """Belongs to the event loop's thread."""

    def __init__(
        self,
        driver: ClusterDriver,
        make: MakeHandle,
        *,
        drain_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._driver = driver
        self._make = make
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._sleep = sleep
        self._supervisors: dict[int, Supervisor] = {}
        self._leaving: set[int] = set()

    def numbers(self) -> list[int]:
        """Return those that are up, start or restart, and are to stay."""
        return sorted(self._supervisors.keys() - self._leaving)

    def number_of(self, name: str) -> int | None:
        """Return the number of the instance that is called so."""
        return next((n for n in self._supervisors if instance_id(n) == name), None)

    def names(self) -> list[str]:
        return [instance_id(number) for number in sorted(self._supervisors)]

    def readies(self) -> dict[InstanceId, Ready]:
        """Return what each said when it last came up."""
        return {
            instance_id(number): supervisor.ready
            for number, supervisor in sorted(self._supervisors.items())
            if supervisor.ready is not None
        }

    def is_starting(self, number: int) -> bool:
        supervisor = self._supervisors.get(number)
        return supervisor is not None and supervisor.is_starting

    # --- what is done with one ---

    def add(self) -> int:
        """Return the number of a new one, the smallest that is free."""
        number = next(n for n in itertools.count() if n not in self._supervisors)
        make = partial(self._make, number)
        supervisor = Supervisor(self._driver, make, clock=self._clock, sleep=self._sleep)
        self._supervisors[number] = supervisor
        return number

    async def join(self, number: int) -> Ready:
        """Bring up one that was added. Raises UserError; then it is still to be removed."""
        return await self._supervisors[number].start()

    async def drain(self, number: int, say: Say) -> None:
        """Give it no new work and wait until it has none."""
        name = instance_id(number)
        say(f"{name} drains")
        drained = await self._driver.drain_instance(name, self._drain_timeout_s)
        moved = f", {drained.num_moved} requests went on elsewhere" if drained.num_moved else ""
        say(f"{name} is drained ({drained.seconds:.1f} s{moved})")

    async def leave(self, number: int, say: Say) -> None:
        """Drain it, end it, and forget it."""
        await self.drain(number, say)
        await self.remove(number)
        say(f"{instance_id(number)} has stopped")

    async def renew(self, number: int, say: Say) -> None:
        """Drain it, end it, and start its next incarnation. Raises UserError if that fails."""
        name, supervisor = instance_id(number), self._supervisors[number]
        await self.drain(number, say)
        await supervisor.stop()
        await self._driver.remove_instance(name)
        say(f"{name} has stopped, and starts again")
        start_s = self._clock()
        try:
            await supervisor.renew()
        except Exception as error:
            cause, remedy = supervisor.why_not(error)
            raise UserError(f"{name} does not come up: {cause}", remedy) from error
        say(f"{name} is up ({self._clock() - start_s:.1f} s)")

    def mark_leaving(self, number: int) -> None:
        """It counts no more, though it may serve on for a while."""
        self._leaving.add(number)

    async def remove(self, number: int) -> None:
        """End it, whatever it does, and forget it. May be called twice."""
        supervisor = self._supervisors.get(number)
        if supervisor is not None:
            await supervisor.stop()
            await self._driver.remove_instance(instance_id(number))
            self._supervisors.pop(number, None)
            self._leaving.discard(number)

    async def stop(self) -> None:
        """Start nothing any more; what runs is the driver's to stop."""
        for supervisor in self._supervisors.values():
            await supervisor.stop()

    # --- what is to be seen of them ---

    def states(self) -> dict[int, str]:
        """Return of each: up, draining, drained, starting, or down when it was lost."""
        known = {status.instance_id: status for status in self._driver.instances()}
        found = {}
        for number, supervisor in self._supervisors.items():
            status = known.get(instance_id(number))
            state = "down" if status is None else status.state
            if supervisor.is_starting:
                state = "starting"
            elif status is not None and state == "draining" and not status.num_assigned:
                state = "drained"
            found[number] = state
        return found

    def state(self) -> list[dict[str, Any]]:
        """Return plain data for operators and their programs."""
        known = {status.instance_id: status for status in self._driver.instances()}
        states, shown = self.states(), []
        for number, supervisor in sorted(self._supervisors.items()):
            status, ready = known.get(instance_id(number)), supervisor.ready
            handle = supervisor.handle
            shown.append(
                {
                    "instance": instance_id(number),
                    "state": states[number],
                    "incarnation": supervisor.incarnation,
                    "num_restarts": supervisor.num_restarts,
                    # An instance in this process has neither.
                    "pid": getattr(handle, "pid", None),
                    "node": getattr(handle, "node", None),
                    "model": ready and ready.model_name,
                    "dtype": ready and ready.dtype,
                    "device": ready and ready.device,
                    "num_running": status.num_running if status else 0,
                    "num_waiting": status.num_waiting if status else 0,
                    "num_assigned": status.num_assigned if status else 0,
                    "kv_usage": status.kv_usage if status else 0.0,
                }
            )
        return shown


def instance_id(number: int) -> InstanceId:
    return InstanceId(f"instance-{number}")


def common_ready(readies: Iterable[Ready]) -> Ready:
    """Return what a client may count on, whichever instance serves it.

    The window is the smallest, and so is the memory for keys and values; the start took as long as
    the slowest.
    """
    given = list(readies)
    phases = {name for ready in given for name in ready.startup_s}
    return msgspec.structs.replace(
        given[0],
        dtype=" and ".join(sorted({ready.dtype for ready in given})),
        device=" and ".join(sorted({ready.device for ready in given})),
        kernels="; ".join(sorted({ready.kernels for ready in given if ready.kernels})),
        max_model_len=min(ready.max_model_len for ready in given),
        geometry=min((ready.geometry for ready in given), key=lambda kv: kv.num_tokens),
        startup_s={name: max(ready.startup_s.get(name, 0.0) for ready in given) for name in phases},
    )


def check_serves(name: InstanceId, ready: Ready, common: Ready) -> None:
    """Raise UserError for a later instance that cannot do what clients were promised."""
    if ready.model_name != common.model_name:
        raise UserError(
            f"{name} serves {ready.model_name}, and this server {common.model_name}",
            "see that all nodes have the same model",
        )
    if ready.max_model_len < common.max_model_len:
        raise UserError(
            f"{name} can hold {ready.max_model_len} tokens of a request, and this server promises "
            f"{common.max_model_len}",
            "give its node more memory, or start the server with a lower --max-model-len",
        )
