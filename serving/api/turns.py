"""What computes beside the model takes turns, one at a time, so that generation is not slowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import Request

from serving.admission import jittered
from serving.api.answers import ClientGone
from serving.errors import TooManyRequests, Unavailable
from serving.metrics import Metrics
from serving.telemetry.table import TOKENIZER

_MAX_WAITING = 64  # each holds a body


class Turns:
    """Shared by the routes that take turns. Belongs to the event loop's thread."""

    def __init__(
        self, metrics: Metrics, tenant_share: float, max_num_waiting: int = _MAX_WAITING
    ) -> None:
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._max_num_open = max_num_waiting + 1
        self._max_of_tenant = max(1, int(tenant_share * self._max_num_open))
        self._num_open: Counter[str] = Counter()  # by tenant

    @contextlib.asynccontextmanager
    async def one(self, request: Request) -> AsyncIterator[None]:
        """Wait for a turn, and have it while the block runs: to compute, not to send.

        Raises Unavailable or TooManyRequests if too many wait, ClientGone if nobody does any more.
        """
        tenant = request.state.tenant
        self._check(tenant, request.state.request_id)
        self._num_open[tenant] += 1
        try:
            async with self._turn:
                if await request.is_disconnected():
                    raise ClientGone
                yield
        finally:
            self._num_open[tenant] -= 1
            if not self._num_open[tenant]:
                del self._num_open[tenant]

    def _check(self, tenant: str, request_id: str) -> None:
        is_full = self._num_open.total() >= self._max_num_open
        if not is_full and self._num_open[tenant] < self._max_of_tenant:
            return
        self._metrics.rejected(TOKENIZER)
        wait_s = jittered(1.0, request_id)
        if is_full:
            words = "too many wait for the tokenizer; try again shortly"
            raise Unavailable(words, code="queue_full", retry_after_s=wait_s)
        words = "you have as many texts at the tokenizer as you may; try again shortly"
        raise TooManyRequests(words, retry_after_s=wait_s)
