"""Ray sessions for tests, each with the event loop that it belongs to."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.config import EngineConfig
from scheduler.types import InstanceId
from serving.cluster.hosts.process_session import members_of
from serving.cluster.placement import Placement
from serving.cluster.ray.session import RaySession

BUILD = "tests.serving.checksum_instance:build"


class Started:
    """A session that is up."""

    def __init__(self, runner: asyncio.Runner, **settings) -> None:
        self.runner = runner
        self.run = runner.run
        self.session = RaySession(**settings)
        try:
            self.facts = self.run(self.session.start())
        except BaseException:
            self.stop()
            raise

    def handle(self, name="m", placement=None, **settings):
        config = EngineConfig(model_name=name, model_folder=None)
        placement = placement or Placement()
        return self.session.handle(InstanceId("i0"), config, placement, build=BUILD, **settings)

    def stop(self) -> None:
        self.run(self.session.stop())

    @property
    def folder(self) -> Path:
        assert self.session._folder is not None
        return self.session._folder

    @property
    def control_pid(self) -> int:
        assert self.session._control is not None
        return self.session._control._child.pid

    def pids(self) -> dict[int, str]:
        """Return its processes by name."""
        return {pid: command_of(pid) for pid in members_of(self.control_pid)}

    def pids_of(self, word: str) -> list[int]:
        return [pid for pid, command in self.pids().items() if word in command]


def command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode()
    except OSError:
        return ""
