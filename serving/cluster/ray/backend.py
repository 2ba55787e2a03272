"""The Ray control process: `python -P -m serving.cluster.ray.backend --fd N`.

It alone imports ray. It opens a session or joins a cluster, makes actors and removes them, and says
when one has ended. It sees no request and no token. The API process may lose it and go on; when it
loses the API process, it takes down all that it placed, and of a session of its own everything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from serving.cluster.hosts.frames import FrameConnection
from serving.cluster.hosts.process_session import end_session
from serving.cluster.placement import Placement
from serving.cluster.ray import messages, room
from serving.cluster.ray.actor import InstanceActor
from serving.cluster.ray.address import (
    CONNECT_LIMIT,
    CONNECT_S,
    REFUSED,
    asks_for_a_token,
    checked_address,
)
from serving.cluster.ray.environment import OF_OUR_SESSION, forget_other_clusters
from serving.cluster.ray.messages import (
    CannotOpen,
    ControlReport,
    Ended,
    Open,
    Opened,
    Place,
    Placed,
    Remove,
)
from serving.cluster.ray.session_folder import clear, messages_file, ray_folder
from serving.errors import UserError
from serving.listener import is_loopback

_NAMESPACE = "hocket"
_LOOPBACK = "127.0.0.1"
_OLDEST_RAY = (2, 52)  # the first that knows tokens
_OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray takes: nothing is ever put there
_HEAD_POLL_S = 0.2
_NEVER_FITS_S = 5.0  # for a node that fits to join a cluster
_ROOM_S = 30.0  # for what holds the room to let go of it
_WORKER_S = 120.0  # for Ray to start the process, where there is room
_GOODBYE_S = 3.0  # for a cluster to take back what it lent
_MAX_WORDS_CHARS = 400


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -P -m serving.cluster.ray.backend")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fd", type=int, help="of the socket to the API process")
    kind.add_argument("--stranger-at", help="a cluster; exit with 3 if it asks for a token")
    arguments = parser.parse_args()
    if arguments.stranger_at is not None:
        _be_a_stranger(arguments.stranger_at)
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
        self.orders: queue.SimpleQueue[Place | Remove] = queue.SimpleQueue()
        self._order = order
        self._is_ours = order.address is None
        self._connection = connection
        self._sending = threading.Lock()
        self._placed: dict[str, None] = {}  # the names of what may be there
        self._is_leaving = False

    def run(self) -> NoReturn:
        """Be the session, on the main thread: the head's processes end with the one that forks."""
        try:
            head, opened = _own_session(self._order) if self._is_ours else _joined(self._order)
        except UserError as error:
            self._say(CannotOpen(cause=error.cause, remedy=error.remedy))
            os._exit(1)
        except Exception as error:  # noqa: BLE001 (Ray raises whatever it likes)
            logs = ray_folder(Path(self._order.folder)) / self._order.name / "logs"
            remedy = f"its logs may say why: {logs}"
            if not self._is_ours:
                remedy = "see that the cluster is up, and that its address and token are right"
            self._say(CannotOpen(cause=f"Ray does not start: {_line(error)}", remedy=remedy))
            os._exit(1)
        _quieten(Path(self._order.folder))
        self._say(opened)
        while True:
            with contextlib.suppress(queue.Empty):
                self._obey(self.orders.get(timeout=_HEAD_POLL_S))
            gone = _ended_of(head)
            if gone is not None and not self._is_leaving:  # else we have ended it ourselves
                _print(f"Ray's {gone} has ended")
                os._exit(1)  # the instances go on; the next session is another process's

    def leave(self) -> NoReturn:
        """The API process is gone, or wants no more: leave nothing behind but logs."""
        self._is_leaving = True
        if self._is_ours:
            end_session(os.getpid(), keep=[os.getpid()])
            clear(Path(self._order.folder))
        else:
            removing = threading.Thread(target=self._remove_all, daemon=True)
            removing.start()
            removing.join(_GOODBYE_S)
        os._exit(0)

    def _obey(self, order: Place | Remove) -> None:
        # Each on a thread of its own: Ray may hang, and an actor's thread waits for its end.
        if isinstance(order, Place):
            self._placed[order.name] = None
            threading.Thread(target=self._keep, args=(order,), daemon=True).start()
        else:
            threading.Thread(target=self._remove, args=(order.name,), daemon=True).start()

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
            ended = Ended(name=name, cause=f"Ray: {_line(error)}")
        self._say(ended)
        self._remove(name)

    def _place_and_wait(self, order: Place) -> None:
        import ray

        placement = order.placement
        _await_a_fit(placement, 0.0 if self._is_ours else _NEVER_FITS_S)
        options: dict[str, Any] = {
            "name": order.name,
            "namespace": _NAMESPACE,
            # So that it outlives this process; its connection is its life.
            "lifetime": "detached",
            "max_restarts": 0,
            **room.options(placement),
        }
        if placement.num_devices > 1:
            options["scheduling_strategy"] = _reserved(order)
        actor = ray.remote(InstanceActor).options(**options).remote()
        self._say(Placed(name=order.name))
        up = actor.__ray_ready__.remote()
        if not ray.wait([up], timeout=_ROOM_S)[0] and not _has_room(placement):
            raise _no_node(placement, "free")
        ray.get(up, timeout=_WORKER_S)
        ray.get(actor.serve.remote(order.dial))

    def _remove(self, name: str) -> None:
        import ray
        from ray.util import get_placement_group, remove_placement_group

        self._placed.pop(name, None)
        with contextlib.suppress(Exception):  # there is none (any more), or Ray is not well
            ray.kill(ray.get_actor(name, _NAMESPACE))
        with contextlib.suppress(Exception):
            remove_placement_group(get_placement_group(name))

    def _remove_all(self) -> None:
        for name in list(self._placed):
            self._remove(name)


# --- sessions ---


def _own_session(order: Open) -> tuple[Any, Opened]:
    """Start what Ray needs on this machine, for us alone: nobody else can reach it."""
    folder = Path(order.folder)
    forget_other_clusters()
    token = folder / f"{order.name}.token"
    with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.update(OF_OUR_SESSION, RAY_AUTH_TOKEN_PATH=str(token))
    import ray
    from ray._private import ray_constants, services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    _check_version(ray.__version__)
    # Else 127.0.0.1 is taken for this machine's address, and all its processes listen to everyone.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # `ray.init` would start as much again that nobody asks: an autoscaler's monitor, a relay of
    # logs, a dashboard without pages, each a Python process of 80 to 100 MB (4.4 s against 2.5 s).
    services.start_api_server = lambda *_, **__: ("", None)
    params = RayParams(
        node_ip_address=_LOOPBACK,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        min_worker_port=0,
        max_worker_port=0,
        temp_dir=str(ray_folder(folder)),  # which Ray opens to everyone: it lies in ours
        session_name=order.name,
    )
    head = Node(params, head=True, shutdown_at_exit=False, ray_init_cluster=True)
    address = head.address_info["gcs_address"]
    ray.init(address, namespace=_NAMESPACE, log_to_driver=False, configure_logging=False)
    return head, Opened(address=address, logs=head.get_logs_dir_path(), version=ray.__version__)


def _joined(order: Open) -> tuple[None, Opened]:
    """Join a cluster that others keep, with the token that the user's environment names."""
    assert order.address is not None
    address = checked_address(order.address)
    os.environ.setdefault(*CONNECT_LIMIT)
    import ray
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is of native code

    _check_version(ray.__version__)
    if is_loopback(address.rpartition(":")[0]):  # else it is taken for this machine's address
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        if address != "auto":
            GcsClient(address=address)  # `ray.init` would try a wrong token for 20 s
        ray.init(address, namespace=_NAMESPACE, log_to_driver=False, configure_logging=False)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} refuses us: its token is another, or there is none here",
            "name the cluster's token in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token",
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster at {address}: {_line(error)}", "see that its head is up"
        ) from error
    at = str(ray.get_runtime_context().gcs_address)
    if not is_loopback(at.rpartition(":")[0]) and not asks_for_a_token(at):
        raise UserError(
            f"the cluster at {at} asks nobody for a token: who reaches it may run what they like",
            "start every node of it with RAY_AUTH_MODE=token and the same token",
        )
    return None, Opened(
        address=at,
        logs=ray._private.worker._global_node.get_logs_dir_path(),
        version=ray.__version__,
        node_host=ray.util.get_node_ip_address(),
        num_nodes=sum(node["Alive"] for node in ray.nodes()),
    )


def _be_a_stranger(address: str) -> NoReturn:
    """Ask the cluster for its nodes without a token; exit with what came of it."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is of native code

    try:
        GcsClient(address=address).get_all_node_info(timeout=CONNECT_S)
    except ray.exceptions.AuthenticationError:
        os._exit(REFUSED)
    except Exception as error:  # noqa: BLE001 (whatever it was, it was no refusal)
        _print(f"whether the cluster asks for a token: {_line(error)}")
    os._exit(1)


def _check_version(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_RAY:
        raise UserError(
            f"Ray {version} cannot keep strangers out",
            "install ray 2.52 or newer, which knows tokens",
        )


def _ended_of(head: Any) -> str | None:
    """Return which process of the head has ended, if one has."""
    for kind, infos in ({} if head is None else head.all_processes).items():
        if any(info.process.poll() is not None for info in infos):
            return str(kind)
    return None


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


def _has_room(placement: Placement) -> bool:
    """Whether a node has what it asks for now, so that room is not what it waits for."""
    import ray

    return room.fits(placement, _nodes(), ray._private.state.available_resources_per_node())


def _no_node(placement: Placement, when: str) -> UserError:
    return UserError(
        room.lack(placement, _nodes(), when), "ask for less, end what holds it, or add a node"
    )


def _reserved(order: Place) -> Any:
    """Reserve room for all devices on one node; the actor has the first of the bundles."""
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    placement = order.placement
    bundles = [room.bundle(placement) for _ in range(placement.num_devices)]
    group = placement_group(
        bundles,
        strategy="STRICT_PACK",
        name=order.name,
        lifetime="detached",
        bundle_label_selector=[dict(placement.labels)] * len(bundles) if placement.labels else None,
    )
    if not group.wait(_ROOM_S):
        raise _no_node(placement, "free")
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)


# --- words ---


def _line(error: Exception) -> str:
    """Return an error of Ray's, which may be a page, as a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_WORDS_CHARS]


def _quieten(folder: Path) -> None:
    """Ray prints a page to stdout for each actor that ends: into a file of its own."""
    sys.stdout = open(messages_file(folder), "a", buffering=1)  # noqa: SIM115 (for good)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 (the API process logs it)


if __name__ == "__main__":
    main()
