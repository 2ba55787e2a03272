"""Where the instances of a server run: one as a child of this process, or several as Ray actors.

It makes the handles of instances by number and incarnation; when, the fleet says.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import EngineConfig
from engine.startup import Progress, StartupTimes
from serving.cluster.handle import InstanceHandle
from serving.cluster.hosts.child import Child
from serving.cluster.hosts.child_host import ChildHost
from serving.cluster.hosts.process import ProcessHandle
from serving.cluster.members import instance_id
from serving.cluster_file import MAX_INSTANCES
from serving.config import ServeConfig

if TYPE_CHECKING:
    from serving.cluster.ray.session import RayFacts, RaySession


class Backend(Protocol):
    @property
    def max_num_instances(self) -> int: ...

    async def start(self) -> None:
        """Have ready what every instance needs. Raises UserError."""
        ...

    def handle(self, number: int, incarnation: int) -> InstanceHandle:
        """Return the handle of an instance that is not started yet."""
        ...

    def facts(self) -> Mapping[str, Any] | None:
        """Return what operators want to know of it, as plain data."""
        ...

    async def stop(self) -> None:
        """Let go of what `start` took; instances have been stopped before."""
        ...


class ChildBackend:
    """One instance, whose first process was started before there was an event loop."""

    max_num_instances = 1

    def __init__(self, config: ServeConfig, child: Child, progress: Progress) -> None:
        self._config = config
        self._child = child
        self._progress = progress

    async def start(self) -> None: ...

    def handle(self, number: int, incarnation: int) -> InstanceHandle:
        is_first = incarnation == 1
        engine = self._config.instance(number).engine
        return ProcessHandle(
            instance_id(number),
            ChildHost(own_log(engine, number, incarnation), self._child if is_first else None),
            watchdog_timeout_s=self._config.watchdog_timeout_s,
            progress=self._progress if is_first else None,
        )

    def facts(self) -> Mapping[str, Any] | None:
        return None

    async def stop(self) -> None: ...


class RayBackend:
    """Each incarnation of an instance is a Ray actor of its own."""

    max_num_instances = MAX_INSTANCES

    def __init__(
        self, config: ServeConfig, session: RaySession, progress: Progress, times: StartupTimes
    ) -> None:
        self._config = config
        self._session = session
        self._progress = progress
        self._times = times
        self._facts: RayFacts | None = None

    async def start(self) -> None:
        with self._times.phase("ray", "starting Ray"):
            self._facts = await self._session.start()

    def handle(self, number: int, incarnation: int) -> InstanceHandle:
        spec = self._config.instance(number)
        # One of those that start together shows how far they are: they all do the same.
        shows = (number, incarnation) == (0, 1)
        return self._session.handle(
            instance_id(number),
            own_log(spec.engine, number, incarnation),
            spec.placement,
            watchdog_timeout_s=self._config.watchdog_timeout_s,
            progress=self._progress if shows else None,
        )

    def facts(self) -> Mapping[str, Any] | None:
        facts = self._facts
        if facts is None:
            return None
        return {
            "address": facts.address,
            "version": facts.version,
            "is_local": facts.is_local,
            "logs": str(facts.logs),
        }

    async def stop(self) -> None:
        await self._session.stop()


def own_log(engine: EngineConfig, number: int, incarnation: int) -> EngineConfig:
    """Return the settings with a decision log of this incarnation's own: none is written over."""
    path = engine.decision_log
    if path is None or (number, incarnation) == (0, 1):  # what the user named is there, or refused
        return engine
    if number:
        path = path.with_name(f"{path.name}.{instance_id(number)}")
    later = (path.with_name(f"{path.name}.{count}") for count in itertools.count(2))
    names = itertools.chain([path], later)
    return replace(engine, decision_log=next(name for name in names if not name.exists()))


def backend_of(
    config: ServeConfig, origin: Child | RaySession, progress: Progress, times: StartupTimes
) -> Backend:
    """Return the one that goes with what was started for it."""
    if isinstance(origin, Child):
        return ChildBackend(config, origin, progress)
    return RayBackend(config, origin, progress, times)
