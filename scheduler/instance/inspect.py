"""Requests and plans as plain data for people who look into a running instance: no tokens."""

from __future__ import annotations

from typing import Any

from scheduler.instance.plan import StepPlan
from scheduler.request import Request


def describe_request(request: Request) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "tenant": request.spec.tenant,
        "rank": request.rank,
        "num_prompt_tokens": len(request.spec.prompt_token_ids),
        "num_output_tokens": len(request.output_token_ids),
        "num_scheduled": request.num_scheduled,
        "num_pending": request.num_pending,
        "num_preemptions": request.num_preemptions,
        "num_cached_tokens": request.num_cached_tokens,
        "in_batch": request.in_batch,
        "waits_for_prefix": request.waits_for is not None,
    }


def describe_plan(plan: StepPlan) -> dict[str, Any]:
    return {
        "step_id": plan.step_id,
        "leaves": list(plan.leaves),
        "clears": [list(group) for group in plan.clears],
        "copies": [list(copy) for copy in plan.copies],
        "joins": [
            {
                "request_id": join.request_id,
                "num_tokens": len(join.token_ids),
                "num_computed_tokens": join.num_computed_tokens,
                "groups": [list(group) for group in join.groups],
            }
            for join in plan.joins
        ],
        "appends": [
            {"request_id": request_id, "groups": [list(group) for group in groups]}
            for request_id, groups in plan.appends
        ],
        "chunks": {chunk.request_id: chunk.num_tokens for chunk in plan.chunks},
    }
