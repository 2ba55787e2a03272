"""A child process that speaks over a socket: started, watched by its exit status, ended.

Owns the process, its end of the socket, and the pipe with what it prints. Mostly it is an instance.
It knows no event loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

from engine.config import EngineConfig
from engine.messages import Begin
from serving.cluster.hosts import wire
from serving.cluster.hosts.frames import frame

PROGRAM = ("-m", "serving.instance")
_ROOT = Path(__file__).parents[3]


class Child:
    """May be made before anything slow is imported, so that it starts beside its parent.

    Make it on the thread that lives longest: the kernel kills it when that thread ends.
    """

    def __init__(self, program: Sequence[str] = PROGRAM, *, own_session: bool = False) -> None:
        """Start the process; with a session of the kernel's to itself, the terminal's signals do
        not reach it. Raises OSError.
        """
        self.connection, theirs = socket.socketpair()
        try:
            # -P, and the same in the environment for what it starts: a folder named `engine`
            # where the user happens to stand shadows nothing.
            self._process = subprocess.Popen(  # noqa: S603 (our own program)
                [sys.executable, "-P", *program, "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment(),
                start_new_session=own_session,
            )
        except OSError:
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> IO[bytes]:
        """What it prints."""
        assert self._process.stdout is not None
        return self._process.stdout

    def begin(self, config: EngineConfig) -> None:
        """Say what to build; once, before an event loop takes the connection."""
        with contextlib.suppress(ConnectionError):  # it has ended: whoever reads will see it
            self.connection.sendall(frame(wire.encode(Begin(config))))

    def is_running(self) -> bool:
        """Whether it has not ended yet; if it has, its number stays its own all the same."""
        if self._process.returncode is not None:
            return False
        try:
            state = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, state) is None
        except ChildProcessError:
            return False

    def has_ended(self) -> bool:
        """Whether it is gone; if so, nothing of it is left in the process table."""
        return self._process.poll() is not None

    def how_it_ended(self, last_words: str) -> str:
        """Return it in words: a signal by name, or the exit status and what it printed last."""
        code = self._process.poll()
        if code is None:
            return "it does not end, although it was killed"
        if code < 0:  # what it may have printed is a dump of many lines
            return f"killed by {_signal_name(-code)}"
        how = f"it exited with status {code}"
        return f"{how}; it last said: {last_words}" if last_words else how

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; to one that has ended, nothing."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Let go of the socket and the pipe; an event loop that took them may have done so."""
        self.connection.close()
        self.output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, whatever happened to the start."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self.close()


def environment() -> dict[str, str]:
    """Return our own with what makes the child import the very code that runs here."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if _ROOT.name not in ("site-packages", "dist-packages"):  # where it is found anyway
        paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
