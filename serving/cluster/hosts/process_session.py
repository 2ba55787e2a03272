"""All processes of one session of the kernel's (setsid): found and ended, whoever started them.

Ray's processes fork others that outlive them by minutes; what they have in common for sure is the
session of the process that started Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_POLL_S = 0.02


def end_session(session_id: int, keep: Collection[int] = (), *, limit_s: float = 5.0) -> bool:
    """Kill what belongs to it, but for `keep`; return whether all of it is gone.

    The process that the session is named after must exist, if only as a zombie: else the number
    may be another's by now.
    """
    deadline_s = time.monotonic() + limit_s
    while members := [pid for pid in members_of(session_id) if pid not in keep]:
        for pid in members:
            _kill(pid, session_id)
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def members_of(session_id: int) -> Iterator[int]:
    """Yield the processes of the session that run."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _session_of(int(folder.name)) == session_id:
            yield int(folder.name)


def _session_of(pid: int) -> int | None:
    """Return None for one that is gone, or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # pid (name) state ppid pgrp session ...; a name may have spaces and brackets in it
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def _kill(pid: int, session_id: int) -> None:
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if _session_of(pid) == session_id:  # still, now that the pidfd holds the number
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
