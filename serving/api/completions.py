"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.api import answers, sse
from serving.api.request_id import request_id_of
from serving.api.responses import json_response
from serving.api.schemas import CompletionRequest
from serving.api.service import Service
from serving.cluster.streams import Delta
from serving.errors import InvalidRequest

# OpenAI's default, which vLLM keeps.
DEFAULT_MAX_TOKENS = 16


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create(body: CompletionRequest, request: Request) -> Response:
        service.check(body)
        prompts = body.prompts()
        limit = service.config.max_num_prompts
        if not 1 <= len(prompts) <= limit:
            raise InvalidRequest(f"prompt must hold 1 to {limit} prompts", param="prompt")
        token_ids = await asyncio.to_thread(
            lambda: [
                service.codec.encode(prompt, add_special_tokens=True)
                if isinstance(prompt, str)
                else prompt
                for prompt in prompts
            ]
        )
        request_id = request_id_of(request)
        group = service.generate(
            body,
            token_ids,
            request_id=request_id,
            param="prompt",
            default_max_tokens=DEFAULT_MAX_TOKENS,
        )
        head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),  # noqa: TID251 (the API's field is wall-clock time)
            "model": service.model_name,
        }

        def chunk(index: int, delta: Delta, first: bool) -> dict[str, Any]:  # noqa: ARG001, FBT001
            return _choice(index, delta.text, delta.finish_reason) | (
                {"token_ids": delta.token_ids} if body.return_token_ids else {}
            )

        if body.stream:
            return sse.event_stream(
                answers.chunks(group, head, chunk, include_usage=body.wants_usage()),
                on_close=partial(service.driver.cancel, group),
            )
        choices = await answers.collect(request, service.driver, group)
        return json_response(
            head
            | {
                "choices": [
                    _choice(index, choice.text, choice.finish_reason)
                    | ({"token_ids": choice.token_ids} if body.return_token_ids else {})
                    for index, choice in enumerate(choices)
                ],
                "usage": answers.usage(group),
            }
        )

    return routes


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
