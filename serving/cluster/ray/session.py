"""A Ray session as the API process sees it: what places instances, and where they call in.

It imports no ray. One session has one control process at a time: when that is lost, the instances
go on, and the next start of one makes another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.startup import Progress
from scheduler.types import InstanceId
from serving.cluster.handle import InstanceHandle
from serving.cluster.hosts.process import ProcessHandle
from serving.cluster.placement import Placement
from serving.cluster.ray.control import RayControl
from serving.cluster.ray.host import RayHost, Started
from serving.cluster.ray.messages import Dial, Open, Opened
from serving.cluster.ray.reception import Reception
from serving.cluster.ray.session_folder import clear, make_folder, remove
from serving.cluster.ray.tls_context import driver_context
from serving.errors import UserError
from serving.listener import is_loopback

if TYPE_CHECKING:
    from serving.cluster.ray.certificates import Authority

_GIVE_BACK_S = 10.0  # for a cluster to be joined, only to remove what is reserved there


@dataclass(frozen=True)
class RayFacts:
    """Where Ray is; `logs` is a folder."""

    address: str
    logs: Path
    version: str
    is_local: bool


class RaySession:
    """`begin` needs no event loop; all else belongs to one."""

    def __init__(self, address: str | None = None, *, host: str = "127.0.0.1") -> None:
        """None: a session of our own on this machine. Else `host` is where instances call in."""
        self._address = address
        self._host = host
        self._prefix = f"hocket-{secrets.token_hex(4)}-"  # of the names of all that is placed
        self._folder: Path | None = None
        self._numbers = itertools.count(1)
        self._reception = Reception()
        self._control: RayControl | None = None
        self._retired: list[RayControl] = []
        self._opening: asyncio.Future[Opened] | None = None
        self._hosts: weakref.WeakSet[RayHost] = weakref.WeakSet()
        self._went_well = True
        self._has_reserved = False  # what outlives an instance in a cluster, until it is removed
        self._authority: Authority | None = None  # of the calls of a joined cluster
        self._called_at = ("", 0)

    def begin(self) -> None:
        """Start the control process, so that Ray starts beside what else is slow."""
        if self._control is None:
            try:
                self._folder = self._folder or make_folder()
                name = f"s{next(self._numbers)}"
                order = Open(
                    address=self._address,
                    folder=str(self._folder),
                    name=name,
                    prefix=self._prefix,
                )
                self._control = RayControl(order)
            except OSError as error:
                raise UserError(
                    f"Ray's control process cannot be started: {error.strerror}",
                    "see that memory, disk and the number of processes are not at their limits",
                ) from error
            self._control.kept = self._pids

    async def start(self) -> RayFacts:
        """Wait until Ray is up. Raises UserError."""
        opened = await self._open()
        return RayFacts(
            address=opened.address,
            logs=Path(opened.logs),
            version=opened.version,
            is_local=self._address is None,
        )

    def handle(
        self,
        instance_id: InstanceId,
        config: EngineConfig,
        placement: Placement,
        *,
        watchdog_timeout_s: float = 30.0,
        startup_timeout_s: float = 600.0,
        progress: Progress | None = None,
        build: str = "",
    ) -> InstanceHandle:
        """Return the handle of a new incarnation. `build` is for tests; see `Dial`."""
        name = f"{self._prefix}{instance_id}-{next(self._numbers)}"

        def dial(name: str, secret: str) -> Dial:
            return self._dial(name, secret, build)

        self._has_reserved = self._has_reserved or placement.num_devices > 1
        host = RayHost(dial, name, config, placement, self._started, self._remove)
        self._hosts.add(host)
        return ProcessHandle(
            instance_id,
            host,
            watchdog_timeout_s=watchdog_timeout_s,
            startup_timeout_s=startup_timeout_s,
            progress=progress,
        )

    async def stop(self) -> None:
        """End the session, and with one of our own all that is left of it."""
        await self._give_back()
        self._reception.close()
        if self._opening is not None:
            self._opening.cancel()
        controls = [*self._retired, *([] if self._control is None else [self._control])]
        self._went_well = self._went_well and not any(control.is_lost for control in controls)
        await asyncio.gather(*(control.stop() for control in controls))
        self._control = None
        if self._folder is not None:
            # The logs of a session of our own are kept if it went badly.
            is_dispensable = self._went_well or self._address is not None
            await asyncio.to_thread(remove if is_dispensable else clear, self._folder)

    # --- for its hosts ---

    async def _started(self) -> Started:
        """Return what places and receives; start it again if it was lost. Raises UserError."""
        await self._open()
        assert self._control is not None
        return Started(self._control, self._reception)

    async def _open(self) -> Opened:
        if self._control is not None and self._control.is_lost:
            self._retire(self._control)
        if self._opening is None:
            self.begin()
            assert self._control is not None
            self._opening = asyncio.ensure_future(self._open_both(self._control))
        control, opening = self._control, self._opening
        try:
            return await asyncio.shield(opening)
        except UserError:
            if control is not None:
                self._retire(control)
            raise

    async def _open_both(self, control: RayControl) -> Opened:
        """Raises UserError."""
        opened = await control.open()
        control.keep({host.name: host.placement for host in self._hosts if host.is_there})
        if self._reception.is_open:
            return opened
        assert self._folder is not None
        if self._address is None:
            await self._reception.open_local(self._folder / "data")
        else:
            await self._open_remote(opened)
        return opened

    async def _open_remote(self, opened: Opened) -> None:
        host = self._host
        if is_loopback(host) and opened.num_nodes > 1:
            raise UserError(
                f"the cluster has {opened.num_nodes} nodes, and none but this one reaches {host}",
                "give --host the address of this machine where the others reach it",
            )
        authority = await asyncio.to_thread(_new_authority)
        context = driver_context(authority.for_driver())
        try:
            port = await self._reception.open_remote(host, context)
        except OSError as error:
            raise UserError(
                f"cannot listen for instances at {host}: {error.strerror}",
                "give --host an address of this machine",
            ) from error
        is_any = host in ("", "0.0.0.0", "::")  # noqa: S104 (only if it was asked for)
        self._called_at = (opened.node_host if is_any else host, port)
        self._authority = authority

    def _retire(self, control: RayControl) -> None:
        """Do without it; the next one is started when it is needed."""
        self._went_well = False  # its logs may be of use
        self._retired = [old for old in self._retired if not old.is_gone]
        if self._control is control:
            control.discard()
            self._retired.append(control)
            self._control, self._opening = None, None

    async def _give_back(self) -> None:
        """Have another control process remove what is reserved, if that which would is lost."""
        is_lost = self._control is None or self._control.is_lost
        if is_lost and self._has_reserved and self._address is not None:
            with contextlib.suppress(UserError, TimeoutError):
                await asyncio.wait_for(self._open(), _GIVE_BACK_S)

    def _remove(self, name: str) -> None:
        if self._control is not None:  # else the next one does, which is told what to keep
            self._control.remove(name)

    def _dial(self, name: str, secret: str, build: str) -> Dial:
        if self._authority is None:
            assert self._folder is not None
            return Dial(name=name, secret=secret, path=str(self._folder / "data"), build=build)
        host, port = self._called_at
        tls = self._authority.for_instance()
        return Dial(name=name, secret=secret, host=host, port=port, tls=tls, build=build)

    def _pids(self) -> list[int]:
        return [host.local_pid for host in self._hosts if host.local_pid is not None]


def _new_authority() -> Authority:
    from serving.cluster.ray.certificates import Authority  # its library is slow to import

    return Authority()
