"""How long one request took, for the client that asks: vLLM's `metrics`, and `Server-Timing`."""

from __future__ import annotations

from serving.cluster.streams import RequestStream


def timings(stream: RequestStream) -> dict[str, float | None]:
    """Return vLLM's `metrics` of an ended request: its names, and what it means by them.

    The time to the first token is from the first step; the wait before is `queue_time_ms`.
    """
    first_s, last_s, queue_s = stream.first_token_at_s, stream.last_token_at_s, stream.queue_s
    metrics: dict[str, float | None] = {
        "time_to_first_token_ms": None,
        "generation_time_ms": None,
        "queue_time_ms": _ms(queue_s),
        "mean_itl_ms": None,
        "tokens_per_second": None,
    }
    if first_s is None or last_s is None or queue_s is None:
        return metrics
    began_s = stream.arrived_at_s + queue_s
    metrics["time_to_first_token_ms"] = _ms(max(0.0, first_s - began_s))
    metrics["generation_time_ms"] = _ms(last_s - first_s)
    if stream.num_tokens > 1:
        metrics["mean_itl_ms"] = _ms((last_s - first_s) / (stream.num_tokens - 1))
    if last_s > began_s:
        metrics["tokens_per_second"] = round(stream.num_tokens / (last_s - began_s), 3)
    return metrics


def server_timing(stream: RequestStream) -> str:
    """Return the value of the header, which browsers' tools show as bars."""
    metrics = timings(stream)
    shown = {
        "queue": metrics["queue_time_ms"],
        "prefill": metrics["time_to_first_token_ms"],
        "decode": metrics["generation_time_ms"],
    }
    return ", ".join(f"{name};dur={value}" for name, value in shown.items() if value is not None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
