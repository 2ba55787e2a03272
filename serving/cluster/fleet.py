"""Keeps N instances of one model, and makes the changes that operators ask for, one at a time.

It says how many there are, which are drained and which are renewed; it decides nothing about
requests, and knows no HTTP. The smallest free number is taken first. Those that do not serve leave
first, then the highest numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from engine.messages import Ready
from engine.startup import Progress
from scheduler.types import InstanceId
from serving import logs
from serving.cluster.change import Change
from serving.cluster.driver import ClusterDriver
from serving.cluster.members import Members, check_serves, common_ready, instance_id
from serving.errors import Conflict, InvalidRequest, NotFound, UserError
from serving.progress import NoProgress

log = logging.getLogger(__name__)

_Work = Callable[[Change], Coroutine[Any, Any, None]]


class Fleet:
    """Belongs to the event loop's thread."""

    def __init__(
        self,
        driver: ClusterDriver,
        members: Members,
        num_instances: int,
        *,
        max_num_instances: int = 1,
        on_numbers: Callable[[list[int]], None] = lambda _: None,
        progress: Progress | None = None,
    ) -> None:
        """`on_numbers` is told which instances are to stay, whenever that changes."""
        self._driver = driver
        self._members = members
        self._num_wanted = num_instances
        self._max_num_instances = max_num_instances
        self._on_numbers = on_numbers
        self._progress = progress or NoProgress()
        self._wished = asyncio.Event()  # for another number than before
        self._common: Ready | None = None
        self._change: Change | None = None  # the last one, done or not
        self._changing: asyncio.Future[None] | None = None

    async def start(self) -> Ready:
        """Bring all up at the same time; return what holds for each. Raises UserError.

        The first that cannot start ends the start of all.
        """
        num = self._num_wanted
        numbers = [self._members.add() for _ in range(num)]
        starts = {number: asyncio.ensure_future(self._first(number)) for number in numbers}
        is_shown = False
        try:
            for num_up, started in enumerate(asyncio.as_completed(starts.values()), start=1):
                await started
                # Until then the first one shows how far its start is.
                if num_up < num and not self._members.is_starting(numbers[0]):
                    if not is_shown:
                        self._progress.phase(f"starting {num} instances", num)
                    is_shown = True
                    self._progress.advance(num_up)
        except BaseException:
            await asyncio.gather(*(self._abandon(*item) for item in starts.items()))
            raise
        self._common = common_ready(self.readies().values())
        self._on_numbers(self._members.numbers())
        return self._common

    async def _first(self, number: int) -> None:
        try:
            await self._members.join(number)
        except UserError as error:
            if self._num_wanted == 1:
                raise
            raise UserError(f"{instance_id(number)}: {error.cause}", error.remedy) from error

    async def stop(self) -> None:
        """Start and change nothing any more; what runs is the driver's to stop."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)
        await self._members.stop()

    def readies(self) -> dict[InstanceId, Ready]:
        """Return what each instance said when it last came up."""
        return self._members.readies()

    def state(self) -> dict[str, Any]:
        """Return plain data for operators and their programs."""
        last = None if self._change is None else self._change.state()
        is_done = self._change is None or self._change.is_done
        return {
            "num_wanted": self._num_wanted,
            "instances": self._members.state(),
            "change": None if is_done else last,
            "last_change": last if is_done else None,
        }

    # --- what operators ask for ---

    def scale(self, num_instances: int) -> Change:
        """Have so many; asked again meanwhile, the last wish counts. Raises RequestError."""
        self._check_number(num_instances)
        self._check_serves()
        self._check_some_stay(num_instances)
        title = f"scaling to {num_instances}"
        current = self._current()
        if current is None or current.kind != "scale":
            change = self._begin("scale", title, self._scale)
        else:
            change, current.title = current, title
        self._num_wanted = num_instances
        self._wished.set()
        return change

    def restart(self) -> Change:
        """Renew all, one at a time. Raises Conflict.

        One alone is renewed too if it does not serve: nothing is taken away by it.
        """
        if list(self._members.states().values()) == ["up"]:
            raise Conflict(
                "there is one instance, and nothing would serve while it restarts",
                "scale to 2 first, or start the server anew",
                code="nothing_would_serve",
            )
        return self._begin("restart", "rolling restart", self._restart)

    def drain(self, name: str) -> Change | None:
        """Let one run empty, and give it no work until it is renewed; None if it has none.

        Raises RequestError.
        """
        number = self._members.number_of(name)
        if number is None:
            raise NotFound(
                f"there is no {name[:100]!r}; there are: {', '.join(self._members.names())}",
                param="instance",
                code="instance_not_found",
            )
        current, title = self._current(), f"draining {name}"
        if current is not None and current.title == title:
            return current
        state = self._members.states()[number]
        if state == "drained":
            return None
        if state not in ("up", "draining"):
            raise Conflict(f"{name} is {state}", "wait until it is up", code="instance_not_up")
        self._check_others_up(number)
        return self._begin("drain", title, partial(self._drain, number))

    def _current(self) -> Change | None:
        """Return the change that is under way."""
        return None if self._change is None or self._change.is_done else self._change

    def _begin(self, kind: str, title: str, work: _Work) -> Change:
        self._check_serves()
        current = self._current()
        if current is not None:
            remedy = "one change at a time: wait for it, `hocket status` shows how far it is"
            raise Conflict(f"{current.title} is under way", remedy)
        number = 1 if self._change is None else self._change.number + 1
        self._change = Change(number, kind, title)
        self._changing = asyncio.ensure_future(_perform(self._change, work))
        return self._change

    def _check_number(self, num_instances: int) -> None:
        if num_instances < 1:
            raise InvalidRequest("instances must be at least 1", param="instances")
        if num_instances == 1 or num_instances <= self._max_num_instances:
            return
        if self._max_num_instances == 1:
            raise Conflict(
                "this server's one instance runs without Ray, and it cannot have more",
                "start it with --instances 2, --cluster or --ray-address",
                code="cannot_scale",
            )
        words = f"instances must be at most {self._max_num_instances}"
        raise InvalidRequest(words, param="instances")

    def _check_serves(self) -> None:
        if self._common is None:
            raise Conflict("the server is still starting", "ask again soon", code="loading")
        if self._driver.draining:
            remedy = "end it with SIGTERM, and start it anew"
            raise Conflict("the server drains", remedy, code="draining")

    def _check_some_stay(self, num_instances: int) -> None:
        """Raise Conflict if fewer are wanted, and none of those that would stay is up."""
        staying = self._members.numbers()
        states = self._members.states()
        if num_instances < len(staying) and not any(states[n] == "up" for n in staying):
            raise Conflict(
                f"none of {len(staying)} instances is up, and nothing would serve",
                "wait until one is, or `hocket restart` renews them",
                code="nothing_would_serve",
            )

    def _check_others_up(self, number: int) -> None:
        states = self._members.states()
        if not any(state == "up" for other, state in states.items() if other != number):
            raise Conflict(
                f"no other instance than {instance_id(number)} is up, and nothing would serve",
                "scale up first, or wait for another",
                code="nothing_would_serve",
            )

    # --- the changes ---

    async def _drain(self, number: int, change: Change) -> None:
        await self._members.drain(number, change.say)

    async def _restart(self, change: Change) -> None:
        states = self._members.states()
        # Those that do not serve come first: the others wait until they do.
        for number in sorted(self._members.numbers(), key=lambda n: (states[n] == "up", n)):
            if self._driver.draining:
                raise UserError("the server drains", "it ends when its requests have")
            if self._members.states()[number] == "up":
                self._check_others_up(number)
            await self._members.renew(number, change.say)

    async def _scale(self, change: Change) -> None:
        starting: dict[int, asyncio.Future[None]] = {}
        leaving: list[asyncio.Future[None]] = []
        try:
            while self._order(change, starting, leaving):
                self._wished.clear()
                wish = asyncio.ensure_future(self._wished.wait())
                under_way: list[asyncio.Future[Any]] = [wish, *starting.values(), *leaving]
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                wish.cancel()
                self._take_stock(change, starting, leaving)
        finally:
            rest = [*starting.values(), *leaving]
            for future in rest:
                future.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def _order(
        self,
        change: Change,
        starting: dict[int, asyncio.Future[None]],
        leaving: list[asyncio.Future[None]],
    ) -> bool:
        """Begin what the wish asks for; return whether anything is under way."""
        staying = self._members.numbers()
        for number in self._least_needed(max(0, len(staying) - self._num_wanted)):
            self._members.mark_leaving(number)
            if number in starting:
                change.say(f"{instance_id(number)} is not wanted any more")
                left = self._abandon(number, starting.pop(number))
                leaving.append(asyncio.ensure_future(left))
            else:
                leaving.append(asyncio.ensure_future(self._members.leave(number, change.say)))
        for _ in range(self._num_wanted - len(staying)):
            number = self._members.add()
            starting[number] = asyncio.ensure_future(self._join(number, change))
        self._on_numbers(self._members.numbers())
        return bool(starting or leaving)

    def _least_needed(self, num: int) -> list[int]:
        """Return so many: those that do not run, then those without work, then the highest."""
        states = self._members.states()
        ranks = {"up": 2, "draining": 1, "drained": 1}
        staying = self._members.numbers()
        return sorted(staying, key=lambda n: (ranks.get(states[n], 0), -n))[:num]

    def _take_stock(
        self,
        change: Change,
        starting: dict[int, asyncio.Future[None]],
        leaving: list[asyncio.Future[None]],
    ) -> None:
        """See what is done. One that could not start is wanted no more, unless asked for since."""
        for number, start in list(starting.items()):
            if start.done():
                del starting[number]
                error = start.exception()
                if error is not None:
                    if not self._wished.is_set():
                        staying = len(self._members.numbers())
                        self._num_wanted = min(self._num_wanted, staying)
                    change.fail(_as_user_error(error, f"{instance_id(number)} does not start"))
        for work in [work for work in leaving if work.done()]:
            leaving.remove(work)
            error = work.exception()
            if error is not None:
                change.fail(_as_user_error(error, "an instance does not leave"))

    async def _join(self, number: int, change: Change) -> None:
        assert self._common is not None
        name = instance_id(number)
        change.say(f"{name} starts")
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        try:
            ready = await self._members.join(number)
            check_serves(name, ready, self._common)
        except BaseException:
            await self._members.remove(number)
            raise
        change.say(f"{name} is up ({loop.time() - start_s:.1f} s)")

    async def _abandon(self, number: int, start: asyncio.Future[Any]) -> None:
        """End one whose start is not wanted any more."""
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await self._members.remove(number)


async def _perform(change: Change, work: _Work) -> None:
    try:
        await work(change)
    except Exception as error:  # noqa: BLE001 (it ends the change, and nothing else)
        change.fail(_as_user_error(error))
    finally:
        change.is_done = True


def _as_user_error(error: BaseException, what: str = "") -> UserError:
    before = f"{what}: " if what else ""
    if isinstance(error, UserError):
        return UserError(before + error.cause, error.remedy)
    if isinstance(error, Conflict):
        return UserError(before + error.message, error.remedy)
    logs.failure(log, "a change of the fleet failed", error)
    return UserError(f"{before}{type(error).__name__}", "see the log of the server")
