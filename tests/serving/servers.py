"""Real servers on loopback for tests: the whole program, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_STARTED = re.compile(r"Serving +(\S+) .* at (http://\S+)/v1")
_ADMIN = re.compile(r"Admin: (http://\S+)")


@dataclass(frozen=True)
class RunningServer:
    process: subprocess.Popen[str]
    url: str
    model: str
    block: str

    @property
    def admin_url(self) -> str:
        found = _ADMIN.search(self.block)
        assert found is not None, "it was started without --admin-port"
        return found[1]

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and not buried."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def starting_server(
    *args: str,
    env: dict[str, str] | None = None,
    start_new_session: bool = False,
    prelude: str = "",
) -> Iterator[subprocess.Popen[str]]:
    """Start `hocket serve ARGS`; yields at once. `prelude` is what its process does first."""
    program = f"{prelude}\nfrom serving.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        start_new_session=start_new_session,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_server(*args: str, **settings: Any) -> Iterator[RunningServer]:
    """Start it on a free port, as above; yields when the ready block has been printed."""
    with starting_server("--port", "0", *args, **settings) as process:
        block, started = "", None
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            block += line
            started = started or _STARTED.search(line)
            if line.startswith("    -d "):
                break
        assert started, f"the server did not start:\n{block}{process.stderr.read()}"
        yield RunningServer(process, started[2], started[1], block)
