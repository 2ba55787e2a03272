"""Servers that a comparison starts and stops. It knows none of them: a command line is all."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp

from loadgen.shown import plain
from loadgen.target import open_session
from loadgen.types import LoadError

READY_S, STOP_S = 300.0, 30.0
_POLL_S = 0.1
_SHOWN_LINES, _SHOWN_CHARS = 5, 200


@asynccontextmanager
async def running(command: str, stop: asyncio.Event) -> AsyncIterator[str]:
    """Start a server and yield its URL once it lists its models; stop it in the end.

    `{port}` in the command is replaced by a free port. Raises LoadError if it does not get ready,
    which it does not once `stop` is set.
    """
    port = free_port()
    if "{port}" not in command:
        raise LoadError(
            f"the server's command does not say where its port goes: {command}",
            "write {port} in it, as in --serve 'hocket serve --port {port}'",
        )
    try:
        words = shlex.split(command.replace("{port}", str(port)))
    except ValueError as error:
        raise LoadError(
            f"the server's command cannot be read: {command} ({error})", "mend its quotes"
        ) from error
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *words, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise LoadError(
                f"{words[0]} cannot be started: {error.strerror}", "give a command that runs here"
            ) from error
        try:
            if not await _gets_ready(process, url, stop):
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                last = [plain(line, _SHOWN_CHARS) for line in lines[-_SHOWN_LINES:]]
                raise LoadError(
                    f"the server did not get ready: {command}\n  " + "\n  ".join(last),
                    "run the command by itself, and see what it says",
                )
            yield url
        finally:
            await _stop(process)


async def _gets_ready(process: asyncio.subprocess.Process, url: str, stop: asyncio.Event) -> bool:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + READY_S
    async with open_session("", 5.0) as session:
        while process.returncode is None and loop.time() < end_s and not stop.is_set():
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(f"{url}/v1/models") as answer:
                    if answer.status == 200:
                        return True
            await asyncio.sleep(_POLL_S)
    return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask the server and what it started to end, then make them."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
