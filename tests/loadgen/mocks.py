"""The mock server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from loadgen.servers import free_port

LOADGEN = [sys.executable, "-m", "loadgen"]


@contextlib.contextmanager
def mock_server(*flags: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start it with these flags; yield the process and its URL. It prints once it listens."""
    port = free_port()
    words = [*LOADGEN, "mock", "--port", str(port), *map(str, flags)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "Next:" in process.stdout.readline() + process.stdout.readline()
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
