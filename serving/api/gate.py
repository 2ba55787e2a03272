"""The door of the routes that generate: who may come in, said before anybody parses a body.

It owns the ticket of each HTTP request and gives it back when the request is over, however that
came. What the bounds are is `serving.admission`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from scheduler.types import RequestId
from serving.admission import (
    BYTES_PER_TOKEN,
    Admission,
    Refusal,
    RefusalReason,
    Ticket,
    jittered,
)
from serving.api.responses import json_response
from serving.api.watch import Clock
from serving.cluster.driver import ClusterDriver
from serving.errors import InvalidRequest, RequestError, TooManyRequests, Unavailable
from serving.metrics import Metrics
from serving.telemetry.table import DRAINING, NO_INSTANCE, QUEUE_TIMEOUT, Endpoint


class Pass:
    """A ticket, for those who have something to say of it: its size, its start, its end."""

    def __init__(
        self,
        admission: Admission,
        ticket: Ticket,
        metrics: Metrics,
        endpoint: Endpoint,
        clock: Clock,
    ) -> None:
        self._admission = admission
        self._ticket = ticket
        self._metrics = metrics
        self._endpoint = endpoint
        self._clock = clock

    @property
    def tenant(self) -> str:
        return self._ticket.tenant

    def correct(self, sizes: Mapping[RequestId, int]) -> None:
        """Tell the prompt tokens of each request. Raises RequestError when it is too much now."""
        refusal = self._admission.correct(self._ticket, sizes, self._clock())
        if refusal is not None:
            self._metrics.turned_away(self._endpoint, refusal.label)
            raise error_of(refusal)

    def started(self, request_id: RequestId) -> None:
        self._admission.started(self._ticket, request_id, self._clock())

    def ended(self, request_id: RequestId) -> None:
        self._admission.ended(self._ticket, request_id, self._clock())

    def check_age(self, now: float) -> RequestError | None:
        """Return the end of a request that has waited too long, None if it may go on.

        Whoever asks ends it then.
        """
        if not self._admission.is_overdue(self._ticket, now):
            return None
        self._metrics.rejected(QUEUE_TIMEOUT)
        retry_after_s = self._admission.retry_after_s(self._ticket.request_id, now)
        return Unavailable(
            "the request waited too long for its turn; try again later",
            code=QUEUE_TIMEOUT,
            retry_after_s=retry_after_s,
        )


class Gate:
    """Wraps the application of one route; inside of it `pass_of` has the request's ticket.

    By then the tenant is known and the body is there, so that a client that sends slowly takes no
    place in the queue.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        driver: ClusterDriver,
        metrics: Metrics,
        endpoint: Endpoint,
        clock: Clock = time.monotonic,
    ) -> None:
        self._app = app
        self._admission = admission
        self._driver = driver
        self._metrics = metrics
        self._endpoint = endpoint
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entered = self._enter(scope)
        if isinstance(entered, RequestError):
            answer = json_response(entered.body(), entered.status, entered.headers())
            await answer(scope, receive, send)
            return
        scope["state"]["entry"] = Pass(
            self._admission, entered, self._metrics, self._endpoint, self._clock
        )
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave(entered, self._clock())

    def _enter(self, scope: Scope) -> Ticket | RequestError:
        state, now = scope["state"], self._clock()
        request_id = state["request_id"]
        if not self._driver.ready:
            code = DRAINING if self._driver.draining else NO_INSTANCE
            self._metrics.turned_away(self._endpoint, code)
            return Unavailable(
                "the server is not taking requests now",
                code=code,
                retry_after_s=jittered(self._driver.up_in_s, request_id),
            )
        num_tokens = state["num_body_bytes"] // BYTES_PER_TOKEN
        entered = self._admission.enter(request_id, state["tenant"], num_tokens, now)
        if isinstance(entered, Refusal):
            self._metrics.turned_away(self._endpoint, entered.label)
            return error_of(entered)
        return entered


def pass_of(request: Request) -> Pass:
    entry: Pass = request.scope["state"]["entry"]
    return entry


def error_of(refusal: Refusal) -> RequestError:
    """Return what the client is told."""
    if refusal.reason is RefusalReason.TOO_MANY:
        return InvalidRequest(
            f"that is more than the {math.floor(refusal.limit)} answers that this server computes "
            "for you at a time: send fewer prompts, or a smaller n",
            param="n",
        )
    what = _WORDS[refusal.reason]
    if refusal.is_tenants:
        return TooManyRequests(
            f"you have {what} already; try again shortly", retry_after_s=refusal.retry_after_s
        )
    return Unavailable(
        f"the server is full: it has {what}; try again shortly",
        code="queue_full",
        retry_after_s=refusal.retry_after_s,
    )


_WORDS = {
    RefusalReason.STREAMS: "as many streams open as it may have",
    RefusalReason.REQUESTS: "as many requests queued as it may have",
    RefusalReason.TOKENS: "as many prompt tokens queued as it may have",
    RefusalReason.AGE: "a queue longer than a request may wait",
}
