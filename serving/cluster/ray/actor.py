"""An instance as a Ray actor: it calls in at the data plane, and then is the program of any other.

Ray makes one by name, on a node that has the same hocket. No ray is imported here, and nothing of a
request ever passes through Ray: its one method never returns.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, NoReturn, cast

import msgspec

from serving.cluster.hosts.frames import frame
from serving.cluster.ray.messages import COMMANDS, OUTPUT, Dial, Hello, decode_dial, encode
from serving.cluster.ray.tls_relay import relayed
from serving.instance import be_instance, ignore_signals
from serving.version import version

if TYPE_CHECKING:
    from serving.instance import Build

_SERVE_S = 60.0  # from when there is an actor to the word that it is to serve


class InstanceActor:
    """One incarnation."""

    def __init__(self) -> None:
        # Who made it may be gone before it says what for, and Ray with it: nobody would end it.
        self._forgotten = threading.Timer(_SERVE_S, os._exit, (1,))
        self._forgotten.daemon = True
        self._forgotten.start()

    def serve(self, dial: bytes) -> NoReturn:
        """Be an instance until the connection ends, and end the process then."""
        self._forgotten.cancel()
        ignore_signals()
        try:
            where = decode_dial(dial)
            output, commands = _called(where)
            _print_to(output)
            # Ray sets it for its workers; how many threads to use is the engine's to say.
            os.environ.pop("OMP_NUM_THREADS", None)
            build = _named(where.build) if where.build else None
        except OSError:  # nobody is there any more: nobody is left to tell
            os._exit(1)
        be_instance(commands, build)


def _called(dial: Dial) -> tuple[socket.socket, socket.socket]:
    """Return the connections for output and commands, which have said whose they are.

    Raises OSError.
    """
    hello = Hello(
        name=dial.name, secret=dial.secret, channel="", version=version(), pid=os.getpid()
    )
    if dial.tls is not None:
        return relayed(dial, hello)
    return _connected(dial.path, hello, OUTPUT), _connected(dial.path, hello, COMMANDS)


def _connected(path: str, hello: Hello, channel: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(frame(encode(msgspec.structs.replace(hello, channel=channel))))
    return connection


def _print_to(connection: socket.socket) -> None:
    """Have all that this process prints, in native code too, go to the server's log."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        os.dup2(connection.fileno(), number)
    connection.close()
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (for good)
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115


def _named(build: str) -> Build:
    module, _, name = build.partition(":")
    return cast("Build", getattr(importlib.import_module(module), name))
