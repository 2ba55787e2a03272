"""The one list of metrics. The page, its vLLM-named twin, the reference and the dashboards are made
of it.

Native names carry no colon and base units, as promtool wants. No label takes a value from a client
but the name of an unknown field, and of those only so many.
"""

from __future__ import annotations

from enum import StrEnum

from scheduler.types import FinishReason, RejectReason
from serving.admission import REFUSAL_LABELS
from serving.telemetry.metric import Alias, Metric

# vLLM's buckets, with finer low ones where a small model on a CPU is quicker than they can tell.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4,
    5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_ITL_S = (
    0.0005, 0.002, 0.004, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_E2E_S = (
    0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50,
    60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_DECISION_S = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
)  # fmt: skip
_LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000,
)  # fmt: skip
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Endpoint(StrEnum):
    """What a client asked for."""

    COMPLETIONS = "completions"
    CHAT = "chat"


GENERATING_ROUTES = ("/v1/completions", "/v1/chat/completions")
_USUAL_STATUS = ("200", "400", "429", "500", "503")

REJECTED = "rejected"
WAITING_REASONS = ("capacity", "deferred")
BLOCK_STATES = ("used", "cached", "claimed", "free")
TIMEOUT = "timeout"  # by the client's own limit
QUEUE_TIMEOUT, TOKENIZER = "queue_timeout", "tokenizer"
LOADING, DRAINING, NO_INSTANCE = "loading", "draining", RejectReason.NO_INSTANCE.value
_OUTCOMES = (*(reason.value for reason in FinishReason), REJECTED, TIMEOUT)
_REASONS = (
    *(reason.value for reason in RejectReason),
    DRAINING,
    *REFUSAL_LABELS,
    QUEUE_TIMEOUT,
    TOKENIZER,
)

# The facts: what happened, and who told.
_ARRIVAL = "a request is accepted (driver)"
_STARTED = "its first step is complete (instance's `StartedEvent`)"
_FIRST = "its first token is delivered (driver)"
_DELIVERED = "a token is delivered (driver)"
_ENDED = "a request ends (driver)"
_SERVED = "a request ends with stop or length (driver)"
_FINISHED = "a request is over at its instance (`FinishedEvent`)"
_VIEW = "an instance's report (`InstanceView`)"
_STEP = "a step is complete (instance's report)"
_READY = "an instance is ready (`Ready`)"
_SERVER = "the server itself"
_PROCESS = "/proc of the API process, at the scrape"

TABLE: tuple[Metric, ...] = (
    # --- requests ---
    Metric(
        "gauge", "requests_running", "Requests that compute", _VIEW,
        labels=("instance",), vllm=Alias("num_requests_running"), dashboard="overview",
    ),
    Metric(
        "gauge", "requests_waiting",
        "Requests queued at an instance, or at the `router` until one has room", _VIEW,
        labels=("instance",), vllm=Alias("num_requests_waiting"), dashboard="overview",
    ),
    Metric(
        "gauge", "requests_waiting_by_reason",
        "Of those: for a place and memory, or for a prefix that another request computes", _VIEW,
        labels=("instance", "reason"), values={"reason": WAITING_REASONS},
        vllm=Alias("num_requests_waiting_by_reason"), dashboard="engine",
    ),
    Metric(
        "counter", "requests",
        "Requests by outcome: each choice of n, or a call that was refused as a whole", _ENDED,
        labels=("endpoint", "outcome"),
        values={"endpoint": tuple(Endpoint), "outcome": _OUTCOMES}, dashboard="overview",
        vllm=Alias(
            "request_success", summed=("endpoint",), labels={"outcome": "finished_reason"},
            only=("outcome", ("stop", "length", "abort", "error")),
        ),
    ),
    Metric(
        "counter", "request_rejections", "Requests refused before they ran, by reason",
        "a request is refused (driver, admission)",
        labels=("reason",), values={"reason": _REASONS}, dashboard="overview",
        vllm=Alias("admission_rejections"),
    ),
    Metric(
        "counter", "request_failures", "Requests that the model failed on", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "http_requests", "HTTP answers by route template and status",
        "an answer is over (middleware)", labels=("route", "status"),
        values={"route": GENERATING_ROUTES, "status": _USUAL_STATUS}, dashboard="overview",
    ),
    Metric(
        "counter", "unknown_fields",
        "Fields of request bodies that the server does not know, the first 50 names",
        "a body is parsed (API)", labels=("field",),
    ),
    # --- latencies ---
    Metric(
        "histogram", "time_to_first_token_seconds", "From arrival to the first token", _FIRST,
        buckets=_TTFT_S, vllm=Alias("time_to_first_token_seconds"), dashboard="overview",
    ),
    Metric(
        "histogram", "inter_token_latency_seconds", "Between two tokens of a request", _DELIVERED,
        buckets=_ITL_S, vllm=Alias("inter_token_latency_seconds"), dashboard="overview",
    ),
    Metric(
        "histogram", "time_per_output_token_seconds",
        "Mean time of each token after the first, of requests with two or more", _SERVED,
        buckets=_ITL_S, vllm=Alias("request_time_per_output_token_seconds"),
        dashboard="overview",
    ),
    Metric(
        "histogram", "e2e_latency_seconds", "From arrival to the end of the answer", _SERVED,
        buckets=_E2E_S, vllm=Alias("e2e_request_latency_seconds"), dashboard="overview",
    ),
    Metric(
        "histogram", "queue_time_seconds", "From the router to the first step",
        _STARTED, buckets=_TTFT_S, vllm=Alias("request_queue_time_seconds"),
        dashboard="overview",
    ),
    Metric(
        "histogram", "prefill_time_seconds", "From the first step to the first token", _FIRST,
        buckets=_TTFT_S, vllm=Alias("request_prefill_time_seconds"), dashboard="engine",
    ),
    Metric(
        "histogram", "decode_time_seconds", "From the first token to the last", _SERVED,
        buckets=_E2E_S, vllm=Alias("request_decode_time_seconds"), dashboard="engine",
    ),
    Metric(
        "histogram", "inference_time_seconds", "From the first step to the last token", _SERVED,
        buckets=_E2E_S, vllm=Alias("request_inference_time_seconds"),
    ),
    Metric(
        "histogram", "schedule_decision_seconds", "Time to decide what a step computes", _STEP,
        labels=("instance",), buckets=_DECISION_S, dashboard="engine",
    ),
    Metric(
        "histogram", "detokenize_seconds",
        "Time to make text of the tokens of a report and give it to their streams",
        "a report with tokens is handled (driver)", buckets=_DECISION_S, dashboard="engine",
    ),
    # --- tokens ---
    Metric(
        "counter", "prompt_tokens", "Prompt tokens of requests that started", _STARTED,
        vllm=Alias("prompt_tokens"), dashboard="overview",
    ),
    Metric(
        "counter", "prompt_tokens_cached", "Of those, found in the prefix cache", _STARTED,
        vllm=Alias("prompt_tokens_cached"), dashboard="engine",
    ),
    Metric(
        "counter", "generation_tokens", "Tokens delivered", _DELIVERED,
        vllm=Alias("generation_tokens"), dashboard="overview",
    ),
    Metric(
        "histogram", "request_prompt_tokens", "Prompt tokens of a request", _SERVED,
        buckets=_REQUEST_TOKENS, vllm=Alias("request_prompt_tokens"), dashboard="overview",
    ),
    Metric(
        "histogram", "request_generation_tokens", "Tokens delivered to a request", _SERVED,
        buckets=_REQUEST_TOKENS, vllm=Alias("request_generation_tokens"), dashboard="overview",
    ),
    Metric(
        "histogram", "request_computed_prompt_tokens",
        "Prompt tokens of a request that were not in the prefix cache", _SERVED,
        buckets=_REQUEST_TOKENS, vllm=Alias("request_prefill_kv_computed_tokens"),
    ),
    Metric(
        "histogram", "request_max_tokens", "max_tokens of a request, cut to its window", _SERVED,
        buckets=_REQUEST_TOKENS, vllm=Alias("request_params_max_tokens"),
    ),
    Metric(
        "histogram", "request_choices", "n of a prompt", _ARRIVAL,
        buckets=(1, 2, 5, 10, 20), vllm=Alias("request_params_n"),
    ),
    # --- steps ---
    Metric("counter", "steps", "Steps completed", _VIEW, labels=("instance",), dashboard="engine"),
    Metric(
        "counter", "computed_tokens", "Tokens computed, recomputation included", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "histogram", "step_seconds", "The executor's time for a step", _STEP,
        labels=("instance",), buckets=_ITL_S, dashboard="engine",
    ),
    Metric(
        "histogram", "step_tokens", "Tokens that a step computed", _STEP,
        labels=("instance",), buckets=_STEP_TOKENS, dashboard="engine",
    ),
    Metric(
        "histogram", "batch_size", "Requests that a step computed", _STEP,
        labels=("instance",), buckets=_BATCH, dashboard="engine",
    ),
    Metric(
        "histogram", "iteration_tokens",
        "Of a report with tokens: those delivered, and the prompts whose first one is among them",
        _STEP, labels=("instance",), buckets=_STEP_TOKENS, vllm=Alias("iteration_tokens_total"),
    ),
    Metric(
        "gauge", "last_step_timestamp_seconds",
        "When the last step was complete, or the instance ready, Unix time",
        _STEP, labels=("instance",), dashboard="engine", vanishes=True,
    ),
    # --- KV memory ---
    Metric(
        "gauge", "kv_cache_usage_ratio", "KV blocks that requests hold, 0 to 1", _VIEW,
        labels=("instance",), vllm=Alias("kv_cache_usage_perc"), dashboard="overview",
    ),
    Metric(
        "gauge", "kv_blocks",
        "KV blocks: used by requests, cached prefixes, claimed for growth, free", _VIEW,
        labels=("instance", "state"), values={"state": BLOCK_STATES}, dashboard="engine",
    ),
    Metric(
        "gauge", "kv_fragmentation_ratio",
        "Free, unclaimed KV blocks outside the longest run of them, 0 to 1", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache",
        _STARTED, vllm=Alias("prefix_cache_queries"), dashboard="overview",
    ),
    Metric(
        "counter", "prefix_cache_hits", "Prompt tokens found computed already", _STARTED,
        vllm=Alias("prefix_cache_hits"), dashboard="overview",
    ),
    Metric(
        "counter", "preemptions", "Requests thrown out to be recomputed", _VIEW,
        labels=("instance",), vllm=Alias("num_preemptions"), dashboard="engine",
    ),
    Metric(
        "histogram", "request_preemptions", "Preemptions of a request", _FINISHED,
        buckets=(0, 1, 2, 5, 10), vllm=Alias("request_num_preemptions"),
    ),
    Metric(
        "counter", "evictions", "KV blocks taken from idle prefixes", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "kv_stolen_blocks", "KV blocks taken from the slack behind another request",
        _VIEW, labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "kv_copied_blocks", "KV blocks copied on write", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "kv_cleared_blocks", "KV blocks set to zero after a failure", _VIEW,
        labels=("instance",), dashboard="engine",
    ),
    # --- instances and the server ---
    Metric(
        "gauge", "instance_up", "1 while the instance serves", _READY,
        labels=("instance",), dashboard="overview",
    ),
    Metric(
        "counter", "dispatches", "Requests handed to the instance", "a dispatch (driver)",
        labels=("instance",), dashboard="engine",
    ),
    Metric(
        "counter", "request_replays",
        "Requests that went on elsewhere, their instance being lost or emptied",
        "a dispatch (driver)", dashboard="overview",
    ),
    Metric(
        "gauge", "config_info", "Always 1; what an instance was started with", _READY,
        labels=("instance", "dtype", "device", "block_size", "num_blocks", "num_kv_tokens",
                "max_model_len", "max_concurrency"),
        vanishes=True,
        vllm=Alias("cache_config_info", labels={
            "num_blocks": "num_gpu_blocks", "num_kv_tokens": "kv_cache_size_tokens",
            "max_concurrency": "kv_cache_max_concurrency",
        }),
    ),
    Metric("gauge", "build_info", "Always 1; what serves", _SERVER, labels=("version", "python")),
    Metric(
        "gauge", "startup_seconds", "Time of each phase of the start, and in total", _SERVER,
        labels=("phase",), dashboard="engine",
    ),
    Metric(
        "histogram", "event_loop_lag_seconds", "How late the event loop wakes a sleeper",
        _SERVER, buckets=_LAG_S, dashboard="overview",
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in TABLE}


# What prometheus_client measures of a process itself, under the names all exporters give it.
PROCESS_METRICS = {
    "process_cpu_seconds_total": "Processor time",
    "process_resident_memory_bytes": "Resident memory",
    "process_virtual_memory_bytes": "Virtual memory",
    "process_start_time_seconds": "Start, Unix time",
    "process_open_fds": "Open file descriptors",
    "process_max_fds": "Limit of open file descriptors",
}
