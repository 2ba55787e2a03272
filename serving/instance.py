"""The program of one model instance: `python -P -m serving.instance --fd N`, or in a Ray actor.

Its first frame says what to build; it answers how the start goes, then Ready or CannotStart, then a
frame for each step. The connection is its life: when the other end closes, it ends at once,
whatever it is doing. It knows no HTTP and no text, and decides nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, NoReturn

import msgspec

from engine import messages
from engine.faults import cause_of, detail_of
from engine.messages import Failed, PhaseAdvanced, PhaseBegun, Ready, Report
from engine.models.errors import ModelFormatError
from engine.startup import CannotStart, StartupTimes
from serving.cluster.hosts import wire
from serving.cluster.hosts.frames import FrameConnection, FrameError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.core import EngineCore

# Puts an instance together, as `engine.build.build_engine` does; a test has one of its own.
Build = Callable[
    ["EngineConfig", StartupTimes, Callable[[Report], None]], "tuple[EngineCore, Ready]"
]

DUMP_SIGNAL = signal.SIGUSR2  # write where every thread is to stderr, and go on
_PR_SET_PDEATHSIG = 1
_MIN_ADVANCE_S = 0.05  # between reports of how far a phase is: nobody reads them faster


def main(build: Build | None = None) -> NoReturn:
    """Be the instance of the parent process, until told to stop."""
    ignore_signals()
    _end_with_the_parent()
    parser = argparse.ArgumentParser(prog="python -P -m serving.instance")
    parser.add_argument("--fd", type=int, required=True, help="of the socket to the driver")
    be_instance(socket.socket(fileno=parser.parse_args().fd), build)


def be_instance(driver: socket.socket, build: Build | None = None) -> NoReturn:
    """Be an instance, in a process that is for nothing else and ignores signals; on any thread.

    Never returns: what is left to tear down is the kernel's. An interpreter that ends in order
    waits for threads, and a device that hangs would hold it up.
    """
    _show_no_messages_of_exceptions()
    faulthandler.enable()  # a crash in native code says where
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    driver.set_inheritable(False)  # what a library may start must not keep it open after us
    status = run(FrameConnection(driver), build)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(connection: FrameConnection, build: Build | None = None) -> int:
    """Build what the first frame says and serve it; return the exit status."""
    payloads = connection.payloads()
    begin = next(payloads, None)
    if begin is None:  # the driver changed its mind
        return 0
    config = wire.decode_begin(begin).config
    built: Future[EngineCore] = Future()
    threading.Thread(target=_read, args=(payloads, built), name="reader", daemon=True).start()

    def emit(report: Report) -> None:
        connection.send(wire.encode(report))

    times = StartupTimes(_SentProgress(connection))
    try:
        build = build or _imported_build(times)
        core, ready = build(config, times, emit)
    except (ModelFormatError, CannotStart) as error:
        connection.send(wire.encode(messages.CannotStart(error.cause, error.remedy)))
        return 1
    except Exception as error:  # noqa: BLE001 (the driver is told)
        emit(Failed(cause_of(error, message=True), detail_of(error)))
        return 1
    emit(msgspec.structs.replace(ready, startup_s=times.seconds))
    built.set_result(core)
    try:
        core.run()
    except Exception:  # noqa: BLE001 (the loop has reported it as Failed)
        return 1
    return 0


def _imported_build(times: StartupTimes) -> Build:
    start_s = time.perf_counter()
    from engine.build import build_engine

    times.seconds["import"] = time.perf_counter() - start_s
    return build_engine


def _read(payloads: Iterator[bytes], built: Future[EngineCore]) -> None:
    """Hand commands over until the driver is gone, and then end the process."""
    try:
        for payload in payloads:
            command = wire.decode_command(payload)
            built.result().inbox.put(command)
    except (OSError, FrameError, msgspec.DecodeError) as error:
        _say("the connection to the driver failed", error)
        os._exit(1)
    os._exit(0)


class _SentProgress:
    """Tells the driver where the start is."""

    def __init__(self, connection: FrameConnection) -> None:
        self._connection = connection
        self._sent_at_s = 0.0

    def phase(self, name: str, total: int | None) -> None:
        self._connection.send(wire.encode(PhaseBegun(name, total)))

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if now - self._sent_at_s >= _MIN_ADVANCE_S:
            self._sent_at_s = now
            self._connection.send(wire.encode(PhaseAdvanced(done)))


def _show_no_messages_of_exceptions() -> None:
    """What is printed goes to the log at every level, and a message may quote a request."""
    sys.excepthook = lambda _, error, __: _say("uncaught", error)
    threading.excepthook = lambda ended: _say("uncaught in a thread", ended.exc_value)
    sys.unraisablehook = lambda ended: _say("ignored", ended.exc_value)


def _say(what: str, error: BaseException | None) -> None:
    where = "no exception" if error is None else cause_of(error)
    print(f"{what}: {where}", file=sys.stderr, flush=True)  # noqa: T201


def ignore_signals() -> None:
    """Ctrl-C, and SIGTERM to a whole group, reach this process too: the driver decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_the_parent() -> None:
    """Have the kernel end this process with the thread that started it.

    A driver that is killed cannot say goodbye, and a loop that is stuck with the interpreter's lock
    does not see its connection end.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
