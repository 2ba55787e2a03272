"""An answer that is not complete: what is due when nothing comes for it, or nobody takes it.

Four things end or touch it, and one timer looks for all of them: its request waited too long, the
client's own time limit has passed, its client reads nothing, its stream has been silent. A client
that leaves is seen without it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.api.gate import Pass
from serving.api.watch import Watch
from serving.cluster.driver import ClusterDriver
from serving.cluster.streams import StreamGroup
from serving.connections import Link
from serving.errors import DeadlineExceeded
from serving.telemetry.table import REJECTED, TIMEOUT

KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class OpenAnswer:
    """A context: inside of it the answer is looked after; at its end its requests are ended."""

    def __init__(
        self,
        driver: ClusterDriver,
        group: StreamGroup,
        entry: Pass,
        *,
        watch: Watch,
        deadline_s: float,
        keep_alive_s: float,
        slow_client_timeout_s: float,
    ) -> None:
        self._driver = driver
        self._group = group
        self._pass = entry
        self._watch = watch
        self._deadline_s = deadline_s  # of the event loop's time; inf: the client set none
        self._keep_alive_s = keep_alive_s
        self._slow_client_timeout_s = slow_client_timeout_s
        self._link: Link | None = None
        self._is_sending = False
        self._moved_at_s: float | None = None  # the last send's begin or end; None: no stream

    def __enter__(self) -> None:
        self._watch.add(self, self._deadline_s)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody reads it any more. May be called twice."""
        self._watch.remove(self)
        self._driver.cancel(self._group)

    def streams_to(self, send: Send, link: Link | None) -> Send:
        """Return `send` with its waits looked at; by the link one can be rid of its reader."""
        self._link = link
        self._moved_at_s = time.monotonic()

        async def send_watched(message: Message) -> None:
            self._is_sending, self._moved_at_s = True, time.monotonic()
            await send(message)
            self._is_sending, self._moved_at_s = False, time.monotonic()

        return send_watched

    def cut_short(self, texts: Callable[[], bytes | None]) -> None:
        """Write from now on what `texts` brings as soon as a step is over, where that can be.

        It returns events, or None if what is new is more than text: then they go through `send`.
        """
        link, clock = self._link, time.monotonic
        if link is None:
            return

        def write_texts() -> bool:
            if self._is_sending or not link.write(texts):
                return False
            self._moved_at_s = clock()
            return True

        self._group.shortcut = write_texts

    def look(self, now: float) -> None:
        if now >= self._deadline_s:
            self._driver.fail(self._group, DeadlineExceeded(), TIMEOUT)
        elif (too_old := self._pass.check_age(now)) is not None:
            self._driver.fail(self._group, too_old, REJECTED)
        if self._moved_at_s is None:
            return
        silent_s = now - self._moved_at_s
        if not self._is_sending:
            if silent_s >= self._keep_alive_s:
                self._group.nudge()
        elif silent_s >= self._slow_client_timeout_s:
            # Generation never waited: what came meanwhile is one delta, and goes with the stream.
            self.close()
            if self._link is not None:
                self._link.hang_up()


class Frame(NamedTuple):
    data: bytes
    is_last: bool


class EventResponse(Response):
    """Frames as they come. Headers go with the first: until then an error has its own status."""

    def __init__(
        self,
        frames: AsyncIterator[Frame],
        answer: OpenAnswer,
        texts: Callable[[], bytes | None] | None,
    ) -> None:
        """`texts` returns frames of text alone, if that is what is new."""
        self._frames = frames
        self._answer = answer
        self._texts = texts
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError if one comes before the first frame."""
        leaving = asyncio.ensure_future(self._close_with_client(receive))
        send = self._answer.streams_to(send, scope["state"].get("link"))
        try:
            with self._answer:
                is_first = True
                async for data, is_last in self._frames:
                    if is_first:
                        is_first = False
                        start = {"type": "http.response.start", "status": self.status_code}
                        await send(start | {"headers": self.raw_headers})
                        if self._texts is not None:
                            self._answer.cut_short(self._texts)
                    more = not is_last
                    await send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            leaving.cancel()

    async def _close_with_client(self, receive: Receive) -> None:
        """End the requests, and with them the frames, when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._answer.close()
