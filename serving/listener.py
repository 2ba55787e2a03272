"""The listening socket: which addresses are safe, and taking one before anything slow happens."""

from __future__ import annotations

import ipaddress
import socket

from serving.errors import UserError

ADMIN_HOST = "127.0.0.1"  # operators come from this machine, or through a tunnel to it
DEFAULT_ADMIN_PORT = 8001  # where `hocket status` and the like look; none is opened by default


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address cannot be had.

    Who comes before there is a server waits for it, and no other process can take the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY where a socket says that it is TCP, and accepted ones say what this
    # one says. Without it every second write waits for the client's delayed ACK, about 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            "choose another with --port or --host",
        ) from error
    return listener
