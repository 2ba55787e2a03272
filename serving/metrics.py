"""What the server counts: facts go in, each is written to the cells that `telemetry.table` names.

It belongs to the event loop and decides nothing. What instances report grows from their start, so
it is counted by difference; an instance that comes back starts from zero.
"""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.messages import Ready
from scheduler.load import InstanceView
from scheduler.types import FinishReason, InstanceId, RejectReason, RequestSpec
from serving.cluster.times import RequestTimes
from serving.telemetry.page import CONTENT_TYPE as CONTENT_TYPE
from serving.telemetry.page import Page
from serving.telemetry.store import MetricStore
from serving.telemetry.table import REJECTED, TABLE, Endpoint
from serving.version import version

_MAX_UNKNOWN_FIELDS = 50
_OTHER = "other"
ROUTER = "router"  # where requests wait that no instance has
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SERVED = (FinishReason.STOP.value, FinishReason.LENGTH.value)
# Counters of a view, by the metric they feed.
_VIEW_COUNTERS: dict[str, Callable[[InstanceView], int]] = {
    "steps": lambda view: view.num_steps,
    "computed_tokens": lambda view: view.num_computed_tokens,
    "preemptions": lambda view: view.num_preemptions,
    "request_failures": lambda view: view.num_failures,
    "evictions": lambda view: view.kv.num_evicted_blocks,
    "kv_stolen_blocks": lambda view: view.kv.num_stolen_blocks,
    "kv_copied_blocks": lambda view: view.kv.num_copied_blocks,
    "kv_cleared_blocks": lambda view: view.kv.num_cleared_blocks,
}


@dataclass(frozen=True, slots=True)
class Totals:
    """What the status line is made of: gauges now, the rest since the start."""

    num_running: int
    num_waiting: int
    kv_usage: float  # of the fullest instance
    num_prompt_tokens: float
    num_generation_tokens: float
    num_prefix_queries: float
    num_prefix_hits: float
    num_rejections: float
    num_preemptions: float


class Metrics:
    """Cells of its own, so that two servers can live in one process."""

    def __init__(self, model_name: str) -> None:
        store = self._store = MetricStore(TABLE)
        self._page = Page(TABLE, store, model_name)
        self._views: dict[InstanceId, InstanceView] = {}
        self._unknown_fields: set[str] = set()
        self._num_queued = 0  # at the router
        self._num_iteration_tokens = 0  # since the last report
        # Written for every token.
        self._generation_tokens = store.number("generation_tokens")
        self._itl = store.histogram("inter_token_latency_seconds")
        store.number("build_info", version(), platform.python_version()).set(1)

    # --- the pages ---

    def render(self) -> bytes:
        """Return the page in Prometheus text format."""
        return self._page.native()

    def render_vllm(self) -> bytes:
        """Return the same numbers under vLLM's names."""
        return self._page.vllm()

    def totals(self) -> Totals:
        store = self._store
        return Totals(
            num_running=int(store.total("requests_running")),
            num_waiting=int(store.total("requests_waiting")),
            kv_usage=max((view.kv_usage for view in self._views.values()), default=0.0),
            num_prompt_tokens=store.total("prompt_tokens"),
            num_generation_tokens=store.total("generation_tokens"),
            num_prefix_queries=store.total("prefix_cache_queries"),
            num_prefix_hits=store.total("prefix_cache_hits"),
            num_rejections=store.total("request_rejections"),
            num_preemptions=store.total("preemptions"),
        )

    # --- instances ---

    def instance_ready(self, instance_id: InstanceId, ready: Ready) -> None:
        """An instance serves from now on, with this memory and window; its counts start at 0."""
        self._views.pop(instance_id, None)
        self._store.expire(instance_id)
        self._store.appear(instance_id)
        self._store.number("instance_up", instance_id).set(1)
        self._stamp(instance_id)
        geometry = ready.geometry
        self._store.number(
            "config_info",
            instance_id,
            ready.dtype,
            ready.device,
            str(geometry.block_size),
            str(geometry.num_blocks),
            str(geometry.num_tokens),
            str(ready.max_model_len),
            str(geometry.num_tokens / ready.max_model_len),
        ).set(1)

    def instance_down(self, instance_id: InstanceId) -> None:
        """An instance is gone, and all that it held; what it had counted stays counted."""
        self._store.expire(instance_id)
        self._views.pop(instance_id, None)

    def instance_removed(self, instance_id: InstanceId) -> None:
        """An instance was taken out by plan: that it is not up is no fault."""
        self._views.pop(instance_id, None)
        self._store.forget(instance_id)

    def step(
        self,
        instance_id: InstanceId,
        view: InstanceView,
        step_s: float,
        plans_s: Sequence[float] = (),
    ) -> None:
        """An instance reports; `step_s` is 0 if no step was complete. Comes after its tokens."""
        store, before = self._store, self._views.get(instance_id)
        self._views[instance_id] = view
        store.number("requests_running", instance_id).set(view.num_running)
        store.number("requests_waiting", instance_id).set(view.num_waiting)
        for reason, num_requests in (
            ("capacity", view.num_waiting - view.num_deferred),
            ("deferred", view.num_deferred),
        ):
            store.number("requests_waiting_by_reason", instance_id, reason).set(num_requests)
        store.number("kv_cache_usage_ratio", instance_id).set(view.kv_usage)
        self._blocks(instance_id, view)
        for name, count in _VIEW_COUNTERS.items():
            increase = count(view) - (count(before) if before else 0)
            store.number(name, instance_id).add(increase)
        for plan_s in plans_s:
            store.histogram("schedule_decision_seconds", instance_id).observe(plan_s)
        if view.num_steps > (before.num_steps if before else 0):
            self._completed(instance_id, view, step_s)
        if self._num_iteration_tokens:
            store.histogram("iteration_tokens", instance_id).observe(self._num_iteration_tokens)
            self._num_iteration_tokens = 0

    def queued(self, num_requests: int) -> None:
        """So many requests wait that no instance has."""
        if num_requests != self._num_queued:
            self._num_queued = num_requests
            store = self._store
            store.number("requests_waiting", ROUTER).set(num_requests)
            store.number("requests_waiting_by_reason", ROUTER, "capacity").set(num_requests)

    def dispatched(self, instance_id: InstanceId, *, is_replay: bool) -> None:
        """A request was handed to an instance; a replay, after it had been handed to another."""
        self._store.number("dispatches", instance_id).add()
        if is_replay:
            self._store.number("request_replays").add()

    # --- requests ---

    def accepted(self, specs: Sequence[RequestSpec]) -> None:
        """Requests of one call were accepted; those that share a prompt differ in `choice`."""
        num_prompts = sum(spec.params.choice == 0 for spec in specs) or 1
        choices = self._store.histogram("request_choices")
        choices.observe(len(specs) // num_prompts, times=num_prompts)

    def rejected(self, reason: RejectReason | str) -> None:
        """A request was refused before it ran; `reason` is one of few, never a client's word."""
        self._store.number("request_rejections", str(reason)).add()

    def turned_away(self, endpoint: Endpoint, reason: str) -> None:
        """A call was refused before there were requests of it, so that none of them will end."""
        self.rejected(reason)
        self._store.number("requests", endpoint, REJECTED).add()

    def started(self, num_prompt_tokens: int, num_cached_tokens: int, queue_s: float) -> None:
        """A request's first step is complete; comes before its first token."""
        store = self._store
        store.histogram("queue_time_seconds").observe(queue_s)
        store.number("prompt_tokens").add(num_prompt_tokens)
        store.number("prompt_tokens_cached").add(num_cached_tokens)
        store.number("prefix_cache_queries").add(num_prompt_tokens)
        store.number("prefix_cache_hits").add(num_cached_tokens)

    def first_token(self, spec: RequestSpec, times: RequestTimes) -> None:
        self._generation_tokens.add()
        self._num_iteration_tokens += len(spec.prompt_token_ids) + 1
        self._observe("time_to_first_token_seconds", times.ttft_s)
        self._observe("prefill_time_seconds", times.prefill_s)

    def next_tokens(self, gaps_s: Sequence[float]) -> None:
        """So many streams got a token, each so long after its last; most gaps of a step are one."""
        self._generation_tokens.add(len(gaps_s))
        self._num_iteration_tokens += len(gaps_s)
        for gap_s, num_gaps in Counter(gaps_s).items():
            self._itl.observe(gap_s, num_gaps)

    def delivered(self, duration_s: float) -> None:
        """The tokens of a report are text, and with their streams."""
        self._observe("detokenize_seconds", duration_s)

    def ended(
        self,
        endpoint: Endpoint,
        outcome: str,
        spec: RequestSpec,
        num_cached_tokens: int,
        times: RequestTimes,
    ) -> None:
        """A request ended: stop, length, abort, error, timeout or rejected. Only the first two are
        served, and only those have a latency to speak of.
        """
        self._store.number("requests", endpoint, outcome).add()
        if outcome not in _SERVED:
            return
        num_prompt_tokens = len(spec.prompt_token_ids)
        self._observe("e2e_latency_seconds", times.e2e_s)
        self._observe("time_per_output_token_seconds", times.tpot_s)
        self._observe("decode_time_seconds", times.decode_s)
        self._observe("inference_time_seconds", times.inference_s)
        self._observe("request_prompt_tokens", num_prompt_tokens)
        self._observe("request_computed_prompt_tokens", num_prompt_tokens - num_cached_tokens)
        self._observe("request_generation_tokens", times.num_tokens)
        self._observe("request_max_tokens", spec.params.max_tokens)

    def finished(self, num_preemptions: int) -> None:
        """A request is over at its instance, whether or not its client still waits."""
        self._observe("request_preemptions", num_preemptions)

    # --- HTTP and the server itself ---

    def http_answered(self, route: str, status: int) -> None:
        """An answer is over; `route` is a template, never the path that was asked for."""
        self._store.number("http_requests", route, str(status)).add()

    def unknown_field(self, name: str) -> str:
        """A body had a field that the server does not know; return the name it is counted by.

        Clients choose these names, so only the first so many that look like one are told apart.
        """
        if name not in self._unknown_fields:
            if len(self._unknown_fields) < _MAX_UNKNOWN_FIELDS and _FIELD_NAME.fullmatch(name):
                self._unknown_fields.add(name)
            else:
                name = _OTHER
        self._store.number("unknown_fields", name).add()
        return name

    def started_up(self, seconds: Mapping[str, float]) -> None:
        """The server is ready; `seconds` are of each phase and in total."""
        for phase, phase_s in seconds.items():
            self._store.number("startup_seconds", phase).set(phase_s)

    def event_loop_lag(self, lag_s: float) -> None:
        self._observe("event_loop_lag_seconds", lag_s)

    # --- how ---

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._store.histogram(name).observe(value)

    def _completed(self, instance_id: InstanceId, view: InstanceView, step_s: float) -> None:
        store, size = self._store, view.last_step
        store.histogram("step_seconds", instance_id).observe(step_s)
        store.histogram("step_tokens", instance_id).observe(size.num_tokens)
        store.histogram("batch_size", instance_id).observe(size.num_requests)
        self._stamp(instance_id)

    def _stamp(self, instance_id: InstanceId) -> None:
        now = time.time()  # noqa: TID251 (compared with Prometheus's own wall-clock time)
        self._store.number("last_step_timestamp_seconds", instance_id).set(now)

    def _blocks(self, instance_id: InstanceId, view: InstanceView) -> None:
        kv = view.kv
        num_unclaimed = view.num_free_blocks - kv.num_idle_blocks - kv.num_claimed_blocks
        for state, num_blocks in (
            ("used", view.num_blocks - view.num_free_blocks),
            ("cached", kv.num_idle_blocks),
            ("claimed", kv.num_claimed_blocks),
            ("free", num_unclaimed),
        ):
            self._store.number("kv_blocks", instance_id, state).set(num_blocks)
        scattered = 1 - kv.longest_free_run_blocks / num_unclaimed if num_unclaimed > 0 else 0.0
        self._store.number("kv_fragmentation_ratio", instance_id).set(scattered)
