"""The Ray control process: `python -P -m serving.cluster.ray.backend --fd N`.

It imports ray, as `opening` does for it and no other file. It makes actors and removes them, and
says when one has ended. It sees no request and no token. The API process may lose it and go on; if
it loses the API process, it takes down all that it placed, and of a session of its own everything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from serving.cluster.hosts.frames import FrameConnection
from serving.cluster.hosts.process_session import end_session
from serving.cluster.placement import Placement
from serving.cluster.ray import messages, room
from serving.cluster.ray.actor import InstanceActor
from serving.cluster.ray.messages import (
    CannotOpen,
    ControlReport,
    Ended,
    Keep,
    Open,
    Place,
    Placed,
    Remove,
)
from serving.cluster.ray.opening import (
    NAMESPACE,
    be_a_stranger,
    ended_of,
    joined,
    line,
    own_session,
)
from serving.cluster.ray.session_folder import clear, messages_file, ray_folder
from serving.errors import UserError

_Made = TypeVar("_Made")

_HEAD_POLL_S = 0.2
_NEVER_FITS_S = 5.0  # for a node that fits to join a cluster
_ROOM_S = 30.0  # for what holds the room to let go of it
_HOLD_S = 2.0  # for a session that has just begun to reserve what is held
_WORKER_S = 120.0  # for Ray to start the process, where there is room
_GOODBYE_S = 3.0  # for a cluster to take back what it lent


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -P -m serving.cluster.ray.backend")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fd", type=int, help="of the socket to the API process")
    kind.add_argument("--stranger-at", help="a cluster; exit with 3 if it asks for a token")
    arguments = parser.parse_args()
    if arguments.stranger_at is not None:
        be_a_stranger(arguments.stranger_at)
    # Ray has the workers import what lies where its driver stands, before our own code: stand where
    # nobody else can put anything, on whatever machine.
    os.chdir("/")
    api = socket.socket(fileno=arguments.fd)
    api.set_inheritable(False)
    connection = FrameConnection(api)
    payloads = connection.payloads()
    first = next(payloads, None)
    if first is None:
        os._exit(0)
    order = messages.decode_command(first)
    assert isinstance(order, Open)
    backend = _Backend(order, connection)
    # Heard on a thread of its own, so that the end is heard even if Ray hangs.
    threading.Thread(target=_hear, args=(payloads, backend), name="api", daemon=True).start()
    backend.run()


def _hear(payloads: Iterator[bytes], backend: _Backend) -> None:
    with contextlib.suppress(OSError):
        for payload in payloads:
            order = messages.decode_command(payload)
            if not isinstance(order, Open):
                backend.orders.put(order)
    backend.leave()


class _Backend:
    """One session of Ray's, from its beginning to its end."""

    def __init__(self, order: Open, connection: FrameConnection) -> None:
        self.orders: queue.SimpleQueue[Place | Keep | Remove] = queue.SimpleQueue()
        self._order = order
        self._is_ours = order.address is None
        self._connection = connection
        self._sending = threading.Lock()
        self._kept: set[str] = set()  # names of ours that may be there
        self._making = threading.Lock()
        self._is_open = False
        self._is_leaving = False

    def run(self) -> NoReturn:
        """Be the session, on the main thread: the head's processes end with the one that forks."""
        try:
            head, opened = own_session(self._order) if self._is_ours else joined(self._order)
        except UserError as error:
            self._say(CannotOpen(cause=error.cause, remedy=error.remedy))
            os._exit(1)
        except Exception as error:  # noqa: BLE001 (Ray raises whatever it likes)
            logs = ray_folder(Path(self._order.folder)) / self._order.name / "logs"
            remedy = f"its logs may say why: {logs}"
            if not self._is_ours:
                remedy = "see that the cluster is up, and that its address and token are right"
            self._say(CannotOpen(cause=f"Ray does not start: {line(error)}", remedy=remedy))
            os._exit(1)
        self._is_open = True
        _quieten(Path(self._order.folder))
        self._say(opened)
        while True:
            with contextlib.suppress(queue.Empty):
                self._obey(self.orders.get(timeout=_HEAD_POLL_S))
            gone = ended_of(head)
            if gone is not None and not self._is_leaving:  # else we have ended it ourselves
                _print(f"Ray's {gone} has ended")
                os._exit(1)  # the instances go on; the next session is another process's

    def leave(self) -> NoReturn:
        """The API process is gone, or wants no more: leave nothing behind but logs."""
        self._is_leaving = True
        if self._is_ours:
            end_session(os.getpid(), keep=[os.getpid()])
            clear(Path(self._order.folder))
        elif self._is_open:  # else nothing is placed, and Ray would start one of its own to look
            removing = threading.Thread(target=self._remove_all_but, args=((),), daemon=True)
            removing.start()
            removing.join(_GOODBYE_S)
        os._exit(0)

    def _obey(self, order: Place | Keep | Remove) -> None:
        # Each on a thread of its own: Ray may hang, and an actor's thread waits for its end.
        match order:
            case Place():
                self._kept.add(order.name)
                self._begin(self._keep, order)
            case Keep():
                self._kept.update(order.placements)
                if self._is_ours:
                    _hold(order.placements)  # before anything else is placed
                else:
                    self._begin(self._remove_all_but, self._kept)
            case Remove():
                self._begin(self._remove, order.name)

    @staticmethod
    def _begin(what: Callable[[Any], None], argument: Any) -> None:
        threading.Thread(target=what, args=(argument,), daemon=True).start()

    def _say(self, report: ControlReport) -> None:
        with self._sending, contextlib.suppress(OSError):  # it is gone: whoever reads ends us
            self._connection.send(messages.encode(report))

    # --- one actor ---

    def _keep(self, order: Place) -> None:
        """Place an actor, and wait for its end."""
        name = order.name
        try:
            self._place_and_wait(order)
            ended = Ended(name=name, cause="its actor has ended")
        except UserError as error:
            ended = Ended(name=name, cause=error.cause, remedy=error.remedy)
        except Exception as error:  # noqa: BLE001 (an actor's end is an error of one kind or other)
            ended = Ended(name=name, cause=f"Ray: {line(error)}")
        self._say(ended)
        self._remove(name)

    def _place_and_wait(self, order: Place) -> None:
        import ray

        placement = order.placement
        _await_a_fit(placement, 0.0 if self._is_ours else _NEVER_FITS_S)
        group = None
        if placement.num_devices > 1 and room.bundle(placement):
            group = self._made(lambda: _group(order.name, placement))
        actor = self._made(lambda: _actor(order, group))
        self._say(Placed(name=order.name))
        up = actor.__ray_ready__.remote()
        if not ray.wait([up], timeout=_ROOM_S)[0] and not _has_room(placement, group):
            raise _no_node(placement, "free")
        ray.get(up, timeout=_WORKER_S)
        ray.get(actor.serve.remote(order.dial))

    def _made(self, make: Callable[[], _Made]) -> _Made:
        """Make what is to be placed, unless `leave` would miss it."""
        with self._making:
            if self._is_leaving:
                raise UserError("the server ends", "")
            return make()

    def _remove(self, name: str) -> None:
        import ray
        from ray.util import get_placement_group, remove_placement_group

        with contextlib.suppress(Exception):  # there is none (any more), or Ray is not well
            ray.kill(ray.get_actor(name, NAMESPACE))
        with contextlib.suppress(Exception):
            remove_placement_group(get_placement_group(name))
        self._kept.discard(name)

    def _remove_all_but(self, kept: Container[str]) -> None:
        """Leave nothing of the server's, whichever of its control processes has placed it.

        What another thread is removing just now is removed here too: that may not come to its end.
        """
        with self._making:
            for name in _names(self._order.prefix):
                if name not in kept:
                    self._remove(name)


def _names(prefix: str) -> set[str]:
    """Return the names in the cluster that begin so, of actors and of what is reserved for them."""
    from ray.util import list_named_actors, placement_group_table

    names: set[str] = set()
    with contextlib.suppress(Exception):  # Ray is not well
        names.update(list_named_actors())
    with contextlib.suppress(Exception):
        groups = placement_group_table().values()
        names.update(group["name"] for group in groups if group["state"] != "REMOVED")
    return {name for name in names if name.startswith(prefix)}


def _actor(order: Place, group: Any) -> Any:
    """Have an actor made, in the first bundle of its group if it has one; it may wait for room."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options: dict[str, Any] = {
        "name": order.name,
        "namespace": NAMESPACE,
        # So that it outlives this process; its connection is its life.
        "lifetime": "detached",
        "max_restarts": 0,
        **room.options(order.placement),
    }
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0
        )
    return ray.remote(InstanceActor).options(**options).remote()


def _hold(placements: Mapping[str, Placement]) -> None:
    """Reserve what instances have that are older than this session, until they are removed."""
    for name, placement in placements.items():
        # Of memory, a new session counts what is free.
        held = dataclasses.replace(placement, memory_bytes=0)
        if room.bundle(held):
            with contextlib.suppress(Exception):  # Ray is not well
                _group(name, held).wait(_HOLD_S)


def _group(name: str, placement: Placement) -> Any:
    """Have room reserved for all devices on one node, as soon as a node has it."""
    from ray.util import placement_group

    bundles = [room.bundle(placement) for _ in range(placement.num_devices)]
    return placement_group(
        bundles,
        strategy="STRICT_PACK",
        name=name,
        lifetime="detached",
        bundle_label_selector=[dict(placement.labels)] * len(bundles) if placement.labels else None,
    )


# --- room ---


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _await_a_fit(placement: Placement, limit_s: float) -> None:
    """Raise UserError if no node could ever hold it, even if it were empty."""
    deadline_s = time.monotonic() + limit_s
    while not room.fits(placement, _nodes()):
        if time.monotonic() >= deadline_s:
            raise _no_node(placement, "at all")
        time.sleep(_HEAD_POLL_S)


def _has_room(placement: Placement, group: Any) -> bool:
    """Whether it has what it asks for, or a node does, so that room is not what it waits for."""
    import ray
    from ray.util import placement_group_table

    if group is not None:
        return bool(placement_group_table(group).get("state") == "CREATED")
    return room.fits(placement, _nodes(), ray._private.state.available_resources_per_node())


def _no_node(placement: Placement, when: str) -> UserError:
    return UserError(
        room.lack(placement, _nodes(), when), "ask for less, end what holds it, or add a node"
    )


# --- words ---


def _quieten(folder: Path) -> None:
    """Ray prints a page to stdout for each actor that ends: into a file of its own."""
    sys.stdout = open(messages_file(folder), "a", buffering=1)  # noqa: SIM115 (for good)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 (the API process logs it)


if __name__ == "__main__":
    main()
