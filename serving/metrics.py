"""What Prometheus sees. The only file with prometheus_client; cores return facts, this counts them.

Names carry no colons and base units, as promtool wants. No label takes a value from a client, but
for the names of unknown fields, of which there are few.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scheduler.load import InstanceView
from scheduler.types import InstanceId

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets with finer low ones, as a small model on a CPU answers in milliseconds.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640,
)  # fmt: skip
_ITL_BUCKETS = (
    0.0005, 0.002, 0.004, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    10, 20, 40,
)  # fmt: skip
_E2E_BUCKETS = (
    0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240,
    480, 960,
)  # fmt: skip

_MAX_UNKNOWN_NAMES, _MAX_FIELD_CHARS = 50, 40


class Metrics:
    """A registry of its own, so that two servers can live in one process."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._views: dict[InstanceId, InstanceView] = {}
        self._running = self._gauge("requests_running", "Requests that compute")
        self._waiting = self._gauge("requests_waiting", "Requests queued at an instance")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "KV blocks in use, 0 to 1")
        self._up = self._gauge("instance_up", "1 while the instance serves")
        self._steps = self._counter("steps", "Steps completed")
        self._preemptions = self._counter("preemptions", "Requests thrown out to be recomputed")
        self._failures = self._counter("request_failures", "Requests that the model failed on")
        self._kv_counters = {
            name: self._counter(f"kv_{name}", f"KV blocks {what}")
            for name, what in (
                ("evicted_blocks", "taken from idle prefixes"),
                ("stolen_blocks", "taken from the slack behind another request"),
                ("copied_blocks", "copied on write"),
                ("cleared_blocks", "set to zero after a failure"),
            )
        }
        self._kv_idle = self._gauge("kv_idle_blocks", "KV blocks that hold prefixes nobody uses")
        self._computed = self._counter("computed_tokens", "Tokens computed, recomputation included")
        self._requests = Counter(
            "hocket_requests", "Requests by outcome", ["model", "outcome"], registry=self._registry
        )
        self._unknown_fields = Counter(
            "hocket_unknown_fields",
            "Fields of requests that nobody knows",
            ["model", "field"],
            registry=self._registry,
        )
        self._unknown_names: set[str] = set()
        self._prompt_tokens = self._total("prompt_tokens", "Prompt tokens of ended requests")
        self._output_tokens = self._total("generation_tokens", "Tokens delivered")
        self._prefix_queries = self._total(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"
        )
        self._prefix_hits = self._total("prefix_cache_hits", "Prompt tokens found computed already")
        self._ttft = self._histogram("time_to_first_token_seconds", "TTFT", _TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "ITL", _ITL_BUCKETS)
        self._e2e = self._histogram("e2e_latency_seconds", "Arrival to end", _E2E_BUCKETS)
        self._queue = self._histogram("queue_time_seconds", "Arrival to first step", _TTFT_BUCKETS)
        self._step_s = self._histogram("step_seconds", "Time of a step", _ITL_BUCKETS)

    def render(self) -> bytes:
        """Return the page in Prometheus text format."""
        return generate_latest(self._registry)

    def instance_up(self, instance_id: InstanceId, *, up: bool) -> None:
        labels = (self._model_name, instance_id)
        self._up.labels(*labels).set(int(up))
        if not up:  # what comes after it counts from 0 again, and runs nothing yet
            self._views.pop(instance_id, None)
            for gauge in (self._running, self._waiting, self._kv_usage, self._kv_idle):
                gauge.labels(*labels).set(0)

    def step(self, instance_id: InstanceId, view: InstanceView, step_s: float) -> None:
        labels = (self._model_name, instance_id)
        before = self._views.get(instance_id)
        self._views[instance_id] = view
        self._running.labels(*labels).set(view.num_running)
        self._waiting.labels(*labels).set(view.num_waiting)
        self._kv_usage.labels(*labels).set(view.kv_usage)
        for counter, name in (
            (self._steps, "num_steps"),
            (self._preemptions, "num_preemptions"),
            (self._computed, "num_computed_tokens"),
            (self._failures, "num_failures"),
        ):
            increase = getattr(view, name) - (getattr(before, name) if before else 0)
            counter.labels(*labels).inc(increase)
        self._kv_idle.labels(*labels).set(view.kv.num_idle_blocks)
        for name, counter in self._kv_counters.items():
            increase = getattr(view.kv, f"num_{name}")
            increase -= getattr(before.kv, f"num_{name}") if before else 0
            counter.labels(*labels).inc(increase)
        if step_s:
            self._step_s.labels(self._model_name).observe(step_s)

    def token(self, since_arrival_s: float, since_last_s: float | None) -> None:
        """Count a delivered token; `since_last_s` is None for a request's first."""
        self._output_tokens.labels(self._model_name).inc()
        if since_last_s is None:
            self._ttft.labels(self._model_name).observe(since_arrival_s)
        else:
            self._itl.labels(self._model_name).observe(since_last_s)

    def ended(self, outcome: str, num_prompt_tokens: int, e2e_s: float) -> None:
        """Count a request that ended: stop, length, abort, error or rejected."""
        self._requests.labels(self._model_name, outcome).inc()
        if outcome != "rejected":
            self._prompt_tokens.labels(self._model_name).inc(num_prompt_tokens)
            self._e2e.labels(self._model_name).observe(e2e_s)

    def unknown_field(self, name: str) -> str:
        """Count a field that nobody knows; return the name it is counted by.

        Names come from clients, so the first 50 stand for themselves, and the rest is "other".
        """
        fits = name.isascii() and name.isidentifier() and len(name) <= _MAX_FIELD_CHARS
        if name not in self._unknown_names:
            if not fits or len(self._unknown_names) == _MAX_UNKNOWN_NAMES:
                name = "other"
            else:
                self._unknown_names.add(name)
        self._unknown_fields.labels(self._model_name, name).inc()
        return name

    def queued(self, queue_s: float) -> None:
        self._queue.labels(self._model_name).observe(queue_s)

    def prefix(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count what a request found of its prompt when it started."""
        self._prefix_queries.labels(self._model_name).inc(num_prompt_tokens)
        self._prefix_hits.labels(self._model_name).inc(num_cached_tokens)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"hocket_{name}", text, ["model", "instance"], registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"hocket_{name}", text, ["model", "instance"], registry=self._registry)

    def _total(self, name: str, text: str) -> Counter:
        return Counter(f"hocket_{name}", text, ["model"], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"hocket_{name}", text, ["model"], buckets=buckets, registry=self._registry
        )
