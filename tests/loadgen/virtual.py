"""An event loop whose time jumps to the next timer: hours of sleeping in no time, exactly."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting it says how long it would have."""

    waited_s = 0.0

    def select(self, timeout=None):
        if timeout:
            self.waited_s += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.waited_s

    def block(self, duration_s: float) -> None:
        """Let time pass in which the loop does nothing else, as in a callback that is slow."""
        self._jumping.waited_s += duration_s


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end. Nothing in it may wait for anything but timers and itself."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
