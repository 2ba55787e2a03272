"""Whether a Ray cluster is at an address, and whether it keeps strangers out. It joins none."""

from __future__ import annotations

import socket
import subprocess
import sys

from serving.cluster.hosts.child import environment
from serving.errors import UserError

CONNECT_S = 5.0
REFUSED = 3  # exit status of a stranger that was shown the door
# Who is refused for a wrong token would try again for half a minute; an environment variable.
CONNECT_LIMIT = ("RAY_py_gcs_connect_timeout_s", "3")
_STRANGER = ("-m", "serving.cluster.ray.backend", "--stranger-at")
_STRANGER_S = 60.0


def checked_address(address: str) -> str:
    """Return it if somebody listens there: Ray itself would try for more than a minute.

    Raises UserError.
    """
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(f"{address} is no address of a Ray cluster", "give its head's HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"no Ray cluster at {address}: {why}", "see that its head is up") from error
    return address


def asks_for_a_token(address: str) -> bool:
    """Try it without one, in another process: Ray reads the environment once."""
    ours = {name: value for name, value in environment().items() if "RAY_AUTH" not in name}
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-P", *_STRANGER, address],
        env={**ours, "RAY_AUTH_MODE": "disabled", CONNECT_LIMIT[0]: CONNECT_LIMIT[1]},
        stderr=subprocess.DEVNULL,
        timeout=_STRANGER_S,
        check=False,
    )
    return done.returncode == REFUSED
