"""One instance in virtual time: the real InstanceScheduler, and a cost table instead of a device.

It turns as the engine's loop does: take what has arrived, plan until `depth` steps are in flight,
wait for the oldest. So on the same arrivals, tokens and costs it makes the same plans as an engine
on a manual clock, and what is tried here is what a server will do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from scheduler.costs import StepCosts, StepShape, num_visits
from scheduler.instance.plan import Join, SampledToken, StepPlan, StepResult
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.request import InvariantError
from scheduler.sim.events import Abort, Arrival, Event, EventQueue
from scheduler.sim.results import Results
from scheduler.types import RequestEvent, RequestSpec

# The output token with this index. By default nothing stops a request before its max_tokens.
TokenSource = Callable[[RequestSpec, int], int]


class _Row:
    """A request in the device's set."""

    __slots__ = ("num_computed", "num_known", "num_prompt", "request_id")

    def __init__(self, join: Join) -> None:
        self.request_id = join.request_id
        self.num_computed = join.num_computed_tokens
        self.num_known = len(join.token_ids)
        self.num_prompt = join.num_prompt_tokens


class SimulatedInstance:
    """Owns virtual time. Put events, then `run`."""

    def __init__(
        self,
        scheduler: InstanceScheduler,
        cost: StepCosts,
        *,
        depth: int = 1,
        token_source: TokenSource = lambda _, __: -1,
        on_plan: Callable[[StepPlan], None] = lambda _: None,
    ) -> None:
        self.scheduler = scheduler
        self.events = EventQueue()
        self.results = Results()
        self.now = 0.0
        self._cost = cost
        self._depth = depth
        self._token_source = token_source
        self._on_plan = on_plan
        # In the order of an executor's persistent batch, as results name requests in that order.
        self._rows: list[_Row] = []
        self._in_flight: deque[tuple[float, StepResult]] = deque()
        self._device_free_s = 0.0

    def run(self) -> Results:
        """Turn until nothing is left to happen."""
        while self.events.next_s is not None or self._in_flight or self.scheduler.has_work:
            self._turn()
        self.results.end_s = self.now
        return self.results

    def _turn(self) -> None:
        next_s = self.events.next_s
        if not self._in_flight and not self.scheduler.has_work and next_s is not None:
            self.now = max(self.now, next_s)
        for event in self.events.pop_until(self.now):
            self._handle(event)
        while len(self._in_flight) < self._depth:
            plan = self.scheduler.plan_step(self.now)
            if plan is None:
                break
            self._on_plan(plan)
            self._submit(plan)
        if self._in_flight:
            done_s, result = self._in_flight.popleft()
            self.now = max(self.now, done_s)
            self.results.num_steps += 1
            for answer in self.scheduler.complete_step(result):
                self.results.happened(answer, self.now)
        elif self.scheduler.has_work:
            raise InvariantError("requests are alive, but no step can be planned")

    def _handle(self, event: Event) -> None:
        answer: RequestEvent | None = None
        match event:
            case Arrival(spec):
                self.results.arrived(spec, self.now)
                answer = self.scheduler.add(spec, self.now)
            case Abort(request_id):
                answer = self.scheduler.abort(request_id)
        if answer is not None:
            self.results.happened(answer, self.now)

    def _submit(self, plan: StepPlan) -> None:
        for request_id in plan.leaves:
            index = next(i for i, row in enumerate(self._rows) if row.request_id == request_id)
            last = self._rows.pop()
            if last.request_id != request_id:
                self._rows[index] = last
        self._rows.extend(map(_Row, plan.joins))
        num_tokens = len(self._rows)
        num_context_tokens = num_seen = 0
        chunks = dict(plan.chunks)
        for row in self._rows:
            length = chunks.get(row.request_id, 1)
            num_tokens += length - 1
            num_seen += num_visits(row.num_computed, length)
            row.num_computed += length
            num_context_tokens += row.num_computed
        shape = StepShape(num_tokens, len(self._rows), num_context_tokens, num_seen)
        cost_s = self._cost.step_s(shape)
        self._device_free_s = max(self.now, self._device_free_s) + cost_s
        result = StepResult(step_id=plan.step_id, sampled=tuple(self._sampled()), duration_s=cost_s)
        self._in_flight.append((self._device_free_s, result))

    def _sampled(self) -> Iterator[SampledToken]:
        """Yield a token of each request whose computed tokens have caught up with its known."""
        for row in self._rows:
            if row.num_computed == row.num_known:
                spec = self.results.records[row.request_id].spec
                token_id = self._token_source(spec, row.num_known - row.num_prompt)
                row.num_known += 1
                yield SampledToken(row.request_id, token_id)
