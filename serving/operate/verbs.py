"""What `hocket status`, `scale`, `restart` and `drain` do: ask, then show how far it is.

The work is the server's, and goes on when nobody watches.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from serving.errors import UserError
from serving.operate.client import AdminClient
from serving.operate.table import table

Say = Callable[[str], None]

_POLL_S = 0.3


class Operator:
    """The commands; `say` shows a line to who typed them.

    For programs (`as_json`) there is one answer, when it is over, in place of lines.
    """

    def __init__(
        self,
        client: AdminClient,
        say: Say,
        *,
        waits: bool = True,
        as_json: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._say = say
        self._tell: Say = (lambda _: None) if as_json else say
        self._waits = waits
        self._as_json = as_json
        self._sleep = sleep

    def status(self) -> None:
        found = self._client.get("/admin/status")
        self._say(_json(found) if self._as_json else table(found))

    def scale(self, num_instances: int) -> None:
        _, answer = self._client.post("/admin/scale", {"instances": num_instances})
        self._follow(answer["change"])

    def restart(self) -> None:
        _, answer = self._client.post("/admin/restart")
        self._follow(answer["change"])

    def drain(self, instance: str | None = None) -> None:
        """Let one instance run empty, or the whole server."""
        if instance is None:
            self._drain_all()
            return
        _, answer = self._client.post("/admin/drain", {"instance": instance})
        if "change" in answer:
            self._follow(answer["change"])
        else:
            self._tell(f"{instance} is drained")
            self._show(answer)

    def _drain_all(self) -> None:
        with _goes_on(self._tell):
            self._show(self._watch_drain())

    def _watch_drain(self) -> dict[str, Any]:
        shown = None
        while True:
            _, answer = self._client.post("/admin/drain")
            num_left = answer["num_requests"]
            if not num_left:
                self._tell("the server is drained: end it with SIGTERM")
                return answer
            if num_left != shown:
                left = "1 request is" if num_left == 1 else f"{num_left} requests are"
                self._tell(f"the server drains: {left} left")
                shown = num_left
            if not self._waits:
                return answer
            self._sleep(_POLL_S)

    def _follow(self, change: dict[str, Any]) -> None:
        """Show what the change does until it is done. Raises UserError if it failed."""
        if not self._waits:
            self._tell(f"{change['title']} has begun; `hocket status` shows how far it is")
            self._show(change)
            return
        with _goes_on(self._tell):
            change = self._watch(change)
        self._show(change)
        if change["error"] is not None:
            raise UserError(change["error"]["cause"], change["error"]["remedy"])
        if change["done"]:
            self._tell(f"{change['title']}: done")

    def _watch(self, change: dict[str, Any]) -> dict[str, Any]:
        """Return the last that is known of it."""
        number, num_shown = change["number"], 0
        while True:
            for line in change["lines"][num_shown:]:
                self._tell(line)
            num_shown = len(change["lines"])
            if change["done"]:
                return change
            self._sleep(_POLL_S)
            found = self._client.get("/admin/status")
            later = found["change"] or found["last_change"]
            if later is None or later["number"] != number:
                self._tell(f"{change['title']} is over, and another change has begun since")
                return change
            change = later

    def _show(self, answer: dict[str, Any]) -> None:
        if self._as_json:
            self._say(_json(answer))


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=2)


@contextlib.contextmanager
def _goes_on(say: Say) -> Iterator[None]:
    """Tell who ends the watching that the work does not end with it."""
    try:
        yield
    except KeyboardInterrupt:
        say("it goes on; `hocket status` shows how far it is")
        raise
