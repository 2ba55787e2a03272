"""How a Ray session begins: one of our own is started, or the cluster of others is joined.

Part of the Ray control process: it imports ray, as `backend` does and no other file. What is then
placed in the session is not its business.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, NoReturn

from serving.cluster.ray.address import (
    CONNECT_LIMIT,
    CONNECT_S,
    REFUSED,
    asks_for_a_token,
    checked_address,
)
from serving.cluster.ray.environment import OF_OUR_SESSION, forget_other_clusters
from serving.cluster.ray.messages import Open, Opened
from serving.cluster.ray.session_folder import ray_folder
from serving.errors import UserError
from serving.listener import is_loopback

NAMESPACE = "hocket"
_LOOPBACK = "127.0.0.1"
_OLDEST_RAY = (2, 52)  # the first that knows tokens
_OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray takes: nothing is ever put there
_MAX_WORDS_CHARS = 400


def own_session(order: Open) -> tuple[Any, Opened]:
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
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    return head, Opened(address=address, logs=head.get_logs_dir_path(), version=ray.__version__)


def joined(order: Open) -> tuple[None, Opened]:
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
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} refuses us: its token is another, or there is none here",
            "name the cluster's token in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token",
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster at {address}: {line(error)}", "see that its head is up"
        ) from error
    at = str(ray.get_runtime_context().gcs_address)
    if not asks_for_a_token(at):  # wherever that is: a head at 127.0.0.1 listens to everyone, too
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


def be_a_stranger(address: str) -> NoReturn:
    """Ask the cluster for its nodes without a token; exit with what came of it."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is of native code

    try:
        GcsClient(address=address).get_all_node_info(timeout=CONNECT_S)
    except ray.exceptions.AuthenticationError:
        os._exit(REFUSED)
    except Exception as error:  # noqa: BLE001 (whatever it was, it was no refusal)
        # Not to stderr: what Ray prints there of a refusal is nobody's concern.
        print(f"whether the cluster asks for a token: {line(error)}", flush=True)  # noqa: T201
    os._exit(1)


def _check_version(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_RAY:
        raise UserError(
            f"Ray {version} cannot keep strangers out",
            "install ray 2.52 or newer, which knows tokens",
        )


def ended_of(head: Any) -> str | None:
    """Return which process of the head has ended, if one has."""
    for kind, infos in ({} if head is None else head.all_processes).items():
        if any(info.process.poll() is not None for info in infos):
            return str(kind)
    return None


def line(error: Exception) -> str:
    """Return an error of Ray's, which may be a page, as a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_WORDS_CHARS]
