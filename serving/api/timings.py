"""How long one request took, for the client that asks: vLLM's `metrics`, and `Server-Timing`."""

from __future__ import annotations

from serving.cluster.times import RequestTimes


def timings(times: RequestTimes) -> dict[str, float | None]:
    """Return vLLM's `metrics` of an ended request: its names, and what it means by them.

    The time to the first token is from the first step; the wait before is `queue_time_ms`.
    """
    inference_s = times.inference_s
    return {
        "time_to_first_token_ms": _ms(times.prefill_s),
        "generation_time_ms": _ms(times.decode_s),
        "queue_time_ms": _ms(times.queue_s),
        "mean_itl_ms": _ms(times.tpot_s),
        "tokens_per_second": round(times.num_tokens / inference_s, 3) if inference_s else None,
    }


def server_timing(times: RequestTimes) -> str:
    """Return the value of the header, which browsers' tools show as bars."""
    spans = {
        "intake": times.intake_s,
        "queue": times.queue_s,
        "prefill": times.prefill_s,
        "decode": times.decode_s,
    }
    return ", ".join(f"{name};dur={_ms(span)}" for name, span in spans.items() if span is not None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
