"""Keeps one instance up: starts it, and starts it again, later and later, when it is lost.

Each start is a new incarnation with a handle of its own. It does not say who gets work; the driver
is told by the handle's reports. What ends by plan is first left alone (`stop`), so that its end is
no loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from engine.messages import Ready
from serving.cluster.driver import ClusterDriver
from serving.cluster.handle import InstanceHandle
from serving.errors import UserError

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
# One that served for so long was well: what ended it is not what a start meets again at once.
WELL_AFTER_S = 60.0
# A restart finds files read and compiled already. One that takes longer than this, and than so many
# times the first start, is stuck.
MIN_RESTART_LIMIT_S = 60.0
RESTART_LIMIT_STARTS = 10


class Supervisor:
    """`make` returns the handle of incarnation 1, 2, ...; belongs to the event loop's thread."""

    def __init__(
        self,
        driver: ClusterDriver,
        make: Callable[[int], InstanceHandle],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._driver = driver
        self._make = make
        self._clock = clock
        self._sleep = sleep
        self._incarnation = 0
        self._delay_s = FIRST_DELAY_S
        self._start_took_s = 0.0
        self._restart_limit_s = MIN_RESTART_LIMIT_S
        self._keeping: asyncio.Task[None] | None = None
        self.handle: InstanceHandle | None = None  # of the last incarnation
        self.ready: Ready | None = None  # what the last one that came up said
        self.is_starting = False
        self.num_restarts = 0  # that nobody asked for

    @property
    def incarnation(self) -> int:
        """The number of the last one that was started, from 1."""
        return self._incarnation

    async def start(self) -> Ready:
        """Bring the instance up and keep it up from now on. Raises UserError if it cannot start.

        What fails at the first start would fail again; what fails later may pass.
        """
        handle, ready = await self._start()
        limit_s = RESTART_LIMIT_STARTS * self._start_took_s
        self._restart_limit_s = max(MIN_RESTART_LIMIT_S, limit_s)
        self._keep_up(handle)
        return ready

    async def renew(self) -> Ready:
        """Start the next incarnation of one that was stopped by plan, and keep it up.

        Raises whatever it does not start for, and goes on trying, as after a loss.
        """
        self._delay_s = FIRST_DELAY_S
        try:
            handle, ready = await self._start(self._restart_limit_s)
        except Exception:
            self._keep_up(None)
            raise
        self._keep_up(handle)
        return ready

    async def stop(self) -> None:
        """Start nothing any more; what runs is the driver's to stop."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping

    def why_not(self, error: Exception) -> tuple[str, str]:
        """Return why a start failed, in a line each of cause and remedy."""
        if isinstance(error, UserError):
            return error.cause, error.remedy
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            cause = f"it took longer than {self._restart_limit_s:g} s"
        return cause, "it is tried again, later and later"

    def _keep_up(self, handle: InstanceHandle | None) -> None:
        self._keeping = asyncio.get_running_loop().create_task(self._keep(handle))

    async def _keep(self, handle: InstanceHandle | None) -> None:
        """Restart it whenever it is lost; without a handle, at once."""
        while True:
            if handle is not None:
                up_at_s = self._clock()
                await self._driver.until_lost(handle)
                if self._clock() - up_at_s >= WELL_AFTER_S:
                    self._delay_s = FIRST_DELAY_S
            handle = await self._restart()

    async def _restart(self) -> InstanceHandle:
        assert self.handle is not None
        instance_id = self.handle.instance_id
        while True:
            if self._driver.draining and not self._driver.num_queued:  # there is no work for it
                await asyncio.Event().wait()
            log.warning("instance %s starts again in %g s", instance_id, self._delay_s)
            self._driver.expect_up(self._clock() + self._delay_s + self._start_took_s)
            await self._sleep(self._delay_s)
            self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)
            self.num_restarts += 1
            try:
                handle, _ = await self._start(self._restart_limit_s)
            except Exception as error:  # noqa: BLE001 (whatever it was, it may pass)
                cause, remedy = self.why_not(error)
                log.error("instance %s does not start: %s; %s", instance_id, cause, remedy)
                continue
            seconds = self._start_took_s
            log.warning("instance %s is up again, started in %.2f s", instance_id, seconds)
            return handle

    async def _start(self, limit_s: float | None = None) -> tuple[InstanceHandle, Ready]:
        self._incarnation += 1
        handle = self.handle = self._make(self._incarnation)
        start_s = self._clock()
        self.is_starting = True
        try:
            async with asyncio.timeout(limit_s):
                ready = await self._driver.start(handle)
        except TimeoutError:
            await handle.stop()
            raise
        finally:
            self.is_starting = False
        self._start_took_s = self._clock() - start_s
        self.ready = ready
        return handle, ready
