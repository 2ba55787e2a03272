"""Records and runs made by hand, for the tests of what is computed of them."""

from __future__ import annotations

from loadgen.types import Record, Run


def answer(intended, sent, received, end, *, prompt=8, cached=0, output=None, tenant="default"):
    """Make the record of a request that succeeded; a token an event if not said otherwise."""
    return Record(
        session=0,
        turn=0,
        tenant=tenant,
        intended_at_s=intended,
        sent_at_s=sent,
        end_at_s=end,
        received_at_s=list(received),
        num_prompt_tokens=prompt,
        num_cached_tokens=cached,
        num_output_tokens=len(received) if output is None else output,
        finish_reason="stop",
    )


def failure(intended, sent, received, end, *, error="disconnected", detail="", **more):
    record = answer(intended, sent, received, end, **more)
    record.error, record.detail, record.finish_reason = error, detail, ""
    return record


def run_of(*records, duration_s=None, name="mock", **more):
    if duration_s is None:
        duration_s = max((record.end_at_s for record in records), default=0.0)
    return Run(
        name=name,
        url="http://127.0.0.1:8000/v1",
        model="tiny",
        seed=7,
        start_unix_s=1_760_000_000.25,
        duration_s=duration_s,
        records=records,
        **more,
    )
