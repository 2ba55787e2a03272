"""The mock server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from loadgen.servers import free_port

LOADGEN = [sys.executable, "-m", "loadgen"]


@contextlib.contextmanager
def mock_server(*flags: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start it with these flags; yield the process and its URL once it accepts connections."""
    port = free_port()
    words = [*LOADGEN, "mock", "--port", str(port), *map(str, flags)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "Next:" in process.stdout.readline() + process.stdout.readline()
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
