"""What the dashboards show: rows of panels, each with its queries. The JSON is made elsewhere.

Queries aggregate over servers of one model; where they tell instances apart, they do it by the
labels `server`, which the scrape configuration makes of the server's address, and `instance`: every
server has an instance-0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.telemetry.metric import PREFIX, Dashboard
from serving.telemetry.table import BY_NAME

Form = Literal["timeseries", "stat"]
_WINDOW = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture; `unit` is Grafana's name of it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    form: Form = "timeseries"


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: titled rows of panels."""

    name: Dashboard
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def _series(name: str, suffix: str = "") -> str:
    """Return the selector of a metric of the table. Raises KeyError for any other."""
    return f'{BY_NAME[name].exposed_name}{suffix}{{model=~"$model"}}'


def _gauge(name: str, by: str = "") -> str:
    return f"sum{_by(by)}({_series(name)})"


def _rate(name: str, by: str = "", suffix: str = "") -> str:
    return f"sum{_by(by)}(rate({_series(name, suffix)}{_WINDOW}))"


def _by(label: str) -> str:
    return f" by ({label}) " if label else ""


def _ratio(part: str, whole: str) -> str:
    """Return a share that is absent where nothing happens, and not 0/0."""
    return f"{part} / ({whole} > 0)"


def _mean(name: str) -> Query:
    return Query(_ratio(_rate(name, suffix="_sum"), _rate(name, suffix="_count")), "mean")


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({q}, {_rate(name, 'le', '_bucket')})", f"p{q * 100:.0f}")
        for q in (0.5, 0.9, 0.99)
    ) + (_mean(name),)


def _latency(title: str, name: str, unit: str = "s") -> Panel:
    return Panel(title, unit, _quantiles(name))


def _single(title: str, unit: str, expr: str, form: Form = "stat") -> Panel:
    return Panel(title, unit, (Query(expr, title),), form)


_HIT_RATIO = _ratio(_rate("prefix_cache_hits"), _rate("prefix_cache_queries"))
_INSTANCE = "server, instance"
INSTANCE_LEGEND = "{{server}} {{instance}}"

OVERVIEW = Board("overview", "Hocket: overview", (
    ("Now", (
        _single("Instances up", "short", _gauge("instance_up")),
        _single("Running", "short", _gauge("requests_running")),
        _single("Waiting", "short", _gauge("requests_waiting")),
        _single("KV in use", "percentunit", f"max({_series('kv_cache_usage_ratio')})"),
        _single("Prefix hits", "percentunit", _HIT_RATIO),
        _single("Event loop lag, p99", "s", _quantiles("event_loop_lag_seconds")[2].expr),
    )),
    ("Traffic", (
        Panel("Requests ended", "reqps", (Query(_rate("requests", "outcome"), "{{outcome}}"),)),
        Panel("Tokens", "short", (
            Query(_rate("prompt_tokens"), "prompt tokens/s"),
            Query(_rate("generation_tokens"), "generated tokens/s"),
        )),
        Panel("HTTP answers", "reqps", (
            Query(_rate("http_requests", "route, status"), "{{route}} {{status}}"),
        )),
        Panel("Refused", "reqps", (
            Query(_rate("request_rejections", "reason"), "{{reason}}"),
        )),
        Panel("Requests", "short", (
            Query(_gauge("requests_running"), "running"),
            Query(_gauge("requests_waiting"), "waiting"),
        )),
        Panel("Went on elsewhere", "ops", (Query(_rate("request_replays"), "requests"),)),
    )),
    ("Latency", (
        _latency("Time to first token", "time_to_first_token_seconds"),
        _latency("Inter-token latency", "inter_token_latency_seconds"),
        _latency("Time per output token", "time_per_output_token_seconds"),
        _latency("End to end", "e2e_latency_seconds"),
        _latency("Queue", "queue_time_seconds"),
    )),
    ("Lengths", (
        _latency("Prompt tokens of a request", "request_prompt_tokens", "short"),
        _latency("Generated tokens of a request", "request_generation_tokens", "short"),
    )),
))  # fmt: skip

ENGINE = Board("engine", "Hocket: engine", (
    ("Steps", (
        Panel("Steps", "ops", (Query(_rate("steps", _INSTANCE), INSTANCE_LEGEND),)),
        _latency("Step time", "step_seconds"),
        _latency("Tokens of a step", "step_tokens", "short"),
        _latency("Requests of a step", "batch_size", "short"),
        Panel("Computed tokens", "short", (
            Query(_rate("computed_tokens", _INSTANCE), INSTANCE_LEGEND),
        )),
        _single("Since the last step", "s",
                f"time() - max({_series('last_step_timestamp_seconds')})"),
    )),
    ("KV memory", (
        Panel("Blocks by state", "short", (Query(_gauge("kv_blocks", "state"), "{{state}}"),)),
        Panel("Fragmentation", "percentunit", (
            Query(f"max by ({_INSTANCE}) ({_series('kv_fragmentation_ratio')})", INSTANCE_LEGEND),
        )),
        Panel("Preemptions", "ops", (Query(_rate("preemptions", _INSTANCE), INSTANCE_LEGEND),)),
        Panel("Blocks moved about", "ops", (
            Query(_rate("evictions"), "evicted"),
            Query(_rate("kv_stolen_blocks"), "stolen"),
            Query(_rate("kv_copied_blocks"), "copied"),
            Query(_rate("kv_cleared_blocks"), "cleared"),
        )),
        Panel("Prompt tokens", "short", (
            Query(_rate("prompt_tokens_cached"), "cached/s"),
            Query(f"{_rate('prompt_tokens')} - {_rate('prompt_tokens_cached')}", "computed/s"),
        )),
    )),
    ("Requests", (
        _latency("Prefill", "prefill_time_seconds"),
        _latency("Decode", "decode_time_seconds"),
        _latency("Scheduler's decision", "schedule_decision_seconds"),
        _latency("Detokenising of a report", "detokenize_seconds"),
        Panel("Waiting, by reason", "short", (
            Query(_gauge("requests_waiting_by_reason", "reason"), "{{reason}}"),
        )),
        Panel("Dispatched", "reqps", (Query(_rate("dispatches", _INSTANCE), INSTANCE_LEGEND),)),
        Panel("Failures in the model", "ops", (
            Query(_rate("request_failures", _INSTANCE), INSTANCE_LEGEND),
        )),
        Panel("Start by phase", "s", (
            Query(f"max by (phase) ({_series('startup_seconds')})", "{{phase}}"),
        )),
    )),
))  # fmt: skip

BOARDS = (OVERVIEW, ENGINE)


def metrics_of(text: str) -> set[str]:
    """Return the names of the table whose series the text names.

    Raises KeyError for a name with our prefix that is none.
    """
    import re

    found = set()
    for name in re.findall(rf"\b{PREFIX}(\w+)", text):
        candidates = [
            metric.name
            for metric in BY_NAME.values()
            for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
            if f"{PREFIX}{name}" == metric.exposed_name + suffix
        ]
        if not candidates:
            raise KeyError(f"{PREFIX}{name} is no metric")
        found.add(candidates[0])
    return found
