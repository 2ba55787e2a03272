"""A process of this machine that need not be our child: watched and signalled by its pidfd.

A pidfd names the process itself: after its end the number may be another's, the pidfd never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable


class ExitWatch:
    """Belongs to the event loop's thread. Raises OSError where the system has no pidfd."""

    def __init__(self, pid: int, on_exit: Callable[[], None]) -> None:
        """`on_exit` is called once, from the event loop, when the process has ended."""
        if not hasattr(os, "pidfd_open"):
            raise OSError("this system has no pidfd")
        self.pid = pid
        self._on_exit = on_exit
        self._pidfd: int | None = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)
        self._is_watched = True

    def has_ended(self) -> bool:
        """Whether it runs no more; a zombie does not."""
        if self._pidfd is None:
            return True
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; to one that has ended, nothing."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        self._unwatch()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _exited(self) -> None:
        self._unwatch()
        self._on_exit()

    def _unwatch(self) -> None:
        if self._is_watched and self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        self._is_watched = False
