"""Questions to instances about their state, and who waits for the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from engine.messages import Inspect
from scheduler.types import InstanceId
from serving.cluster.handle import InstanceHandle
from serving.errors import Unavailable


class Inspections:
    """Numbers each question, so that a late answer is never taken for another's.

    Belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._next_number = 0
        self._asked: dict[int, tuple[InstanceId, asyncio.Future[dict[str, Any] | None]]] = {}

    async def ask(
        self, handles: Iterable[InstanceHandle], timeout_s: float
    ) -> dict[InstanceId, dict[str, Any] | None]:
        """Return every instance's state, None for one that was lost. Raises Unavailable."""
        numbers = [self._send(handle) for handle in handles]
        asked = [self._asked[number] for number in numbers]
        try:
            async with asyncio.timeout(timeout_s):
                return {instance_id: await answer for instance_id, answer in asked}
        except TimeoutError:
            late = ", ".join(instance_id for instance_id, answer in asked if not _answered(answer))
            raise Unavailable(
                f"no answer within {timeout_s:g} s from: {late}", code="no_answer"
            ) from None
        finally:
            for number in numbers:
                del self._asked[number]

    def answered(self, number: int, state: dict[str, Any]) -> None:
        """Take an answer; one that nobody waits for any more is dropped."""
        self._resolve(number, state)

    def lost(self, instance_id: InstanceId) -> None:
        """An instance is down: what it was asked it will not answer."""
        for number, (asked_id, _) in self._asked.items():
            if asked_id == instance_id:
                self._resolve(number, None)

    def _send(self, handle: InstanceHandle) -> int:
        number = self._next_number
        self._next_number += 1
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = (handle.instance_id, answer)
        handle.send(Inspect(number))
        return number

    def _resolve(self, number: int, state: dict[str, Any] | None) -> None:
        if number in self._asked:
            _, answer = self._asked[number]
            if not answer.done():
                answer.set_result(state)


def _answered(answer: asyncio.Future[dict[str, Any] | None]) -> bool:
    """Waiting for it past the time has cancelled it."""
    return answer.done() and not answer.cancelled()
