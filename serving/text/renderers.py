"""A few processes that render one template, each killed and replaced when it takes too long.

Owns the processes and their limits. Knows nothing of messages. Thread-safe. That a template takes
too long is the request's fault; that a process is gone or stopped is ours, and another one renders.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from serving.errors import InvalidRequest, Unavailable, internal_error

log = logging.getLogger(__name__)

# Not imported here: this process needs no jinja2.
_PROGRAM = Path(__file__).with_name("template.py")
_LENGTH = struct.Struct("!I")
# Python and jinja2 take 30 MiB of address space; the rest is for messages and text.
_MEMORY_BYTES = 512 << 20
_START_S = 10.0
_GRACE_S = 1.0  # the child's own alarm is for a parent that is gone
# How long a request waits for one of the processes: all are busy with templates that hang.
_WAIT_S = 10.0


T = TypeVar("T")


class Gone(Exception):
    """The process was ended or stopped by something else than its work."""


class Late(Exception):
    """The process worked for longer than it may, and is dead now."""


class _Process:
    """One child. Belongs to one thread at a time."""

    def __init__(self, source: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A group of its own: Ctrl-C in a terminal is for the server, which may still drain.
            self._child = subprocess.Popen(  # noqa: S603 (our own file)
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
                env={name: value for name, value in os.environ.items() if _is_harmless(name)},
            )
        self._socket = ours
        self.hello: dict[str, Any] = {}
        try:
            self.hello = self.ask({"source": source, "memory_bytes": _MEMORY_BYTES}, _START_S)
        except Late as error:
            self.hello = {"refusal": f"it cannot be compiled: {error}"}

    def ask(self, value: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send and wait for the answer. Raises Gone or Late, the process dead, if none comes."""
        deadline_s = time.monotonic() + limit_s
        payload = json.dumps(value).encode()
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
            (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline_s))
            answer: dict[str, Any] = json.loads(self._read(size, deadline_s))
            return answer
        except TimeoutError as error:
            is_stopped = self._is_stopped()
            self.kill()
            if is_stopped:
                raise Gone("it was stopped") from error
            raise Late(f"it takes longer than {limit_s:g} s") from error
        except OSError as error:
            self.kill()
            if self._child.returncode == -signal.SIGALRM:  # before we noticed how late it is
                raise Late(f"it takes longer than {limit_s:g} s") from error
            raise Gone(f"it ended with status {self._child.returncode}") from error

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self._socket.close()

    def _is_stopped(self) -> bool:
        try:
            state = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # a system that does not tell
            return False
        return state == "T"

    def _read(self, size: int, deadline_s: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(1e-3, deadline_s - time.monotonic()))
            piece = self._socket.recv(min(1 << 20, size - len(data)))
            if not piece:
                raise ConnectionResetError
            data += piece
        return bytes(data)


class Renderers:
    """Renders in at most `num_processes` children, started when first needed."""

    def __init__(self, source: str, *, num_processes: int, limit_s: float) -> None:
        self._source = source
        self._limit_s = limit_s
        self._places = threading.BoundedSemaphore(num_processes)
        self._idle: deque[_Process] = deque()
        weakref.finalize(self, _kill_all, self._idle)

    def names(self) -> frozenset[str]:
        """Return the variables that the template reads. Raises InvalidRequest if it is broken."""
        names = self._by_one_of_two(lambda process: process.hello["names"])
        return frozenset(names)

    def render(self, variables: dict[str, Any], max_chars: int) -> str:
        """Return the text. Raises InvalidRequest, with the reason, if there is none in time.

        Raises RequestError if what renders is ended again and again.
        """
        job = {
            "variables": variables,
            "max_chars": max_chars,
            "limit_s": self._limit_s + _GRACE_S,
        }
        try:
            answer = self._by_one_of_two(lambda process: process.ask(job, self._limit_s))
        except Late as error:
            raise _refusal(str(error)) from None
        if "refusal" in answer:
            raise _refusal(answer["refusal"])
        text: str = answer["text"]
        return text

    def _by_one_of_two(self, use: Callable[[_Process], T]) -> T:
        """Use a process, and a new one if the first is gone. Raises what `use` does."""
        for is_new in (False, True):
            try:
                with self._lent(is_new=is_new) as process:
                    return use(process)
            except Gone as error:
                log.warning("a process that renders chats is gone: %s", error)
        raise internal_error()

    @contextlib.contextmanager
    def _lent(self, *, is_new: bool) -> Iterator[_Process]:
        if not self._places.acquire(timeout=_WAIT_S):
            raise Unavailable("too many chat templates are being rendered", code="queue_full")
        try:
            has_idle = self._idle and not is_new
            process = self._idle.pop() if has_idle else _Process(self._source)
            if not process.alive and "refusal" not in process.hello:  # it died while it idled
                process.kill()
                process = _Process(self._source)
            if "refusal" in process.hello:
                process.kill()
                raise _refusal(process.hello["refusal"])
            yield process
            self._idle.append(process)  # not reached by one that was late, which is dead
        finally:
            self._places.release()


def _is_harmless(name: str) -> bool:
    """Whether a child that runs a stranger's template may see this variable: none holds a key."""
    return name.startswith("PYTHON") or name in ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TZ")


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the model's chat template refuses these messages: {why}", param="messages"
    )


def _kill_all(processes: deque[_Process]) -> None:
    while processes:
        processes.pop().kill()
