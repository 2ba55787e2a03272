"""POST /v1/chat/completions: messages in, a message out."""

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
from serving.api.schemas import ChatRequest
from serving.api.service import Service
from serving.cluster.streams import Delta
from serving.errors import InvalidRequest


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create(body: ChatRequest, request: Request) -> Response:
        service.check(body)
        token_ids = await asyncio.to_thread(_prompt, service, body)
        request_id = request_id_of(request)
        group = service.generate(
            body, [token_ids], request_id=request_id, param="messages", default_max_tokens=None
        )
        head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": int(time.time()),  # noqa: TID251 (the API's field is wall-clock time)
            "model": service.model_name,
        }

        def chunk(index: int, delta: Delta, first: bool) -> dict[str, Any]:  # noqa: FBT001
            # The role comes with the first token: clients measure TTFT at the first chunk.
            role = {"role": "assistant"} if first else {}
            choice = {
                "index": index,
                "delta": role | {"content": delta.text},
                "logprobs": None,
                "finish_reason": delta.finish_reason,
            }
            return choice | ({"token_ids": delta.token_ids} if body.return_token_ids else {})

        if body.stream:
            head["object"] = "chat.completion.chunk"
            return sse.event_stream(
                answers.chunks(group, head, chunk, include_usage=body.wants_usage()),
                on_close=partial(service.driver.cancel, group),
            )
        choices = await answers.collect(request, service.driver, group)
        return json_response(
            head
            | {
                "choices": [
                    {
                        "index": index,
                        "message": {"role": "assistant", "content": choice.text},
                        "logprobs": None,
                        "finish_reason": choice.finish_reason,
                    }
                    | ({"token_ids": choice.token_ids} if body.return_token_ids else {})
                    for index, choice in enumerate(choices)
                ],
                "usage": answers.usage(group),
            }
        )

    return routes


def _prompt(service: Service, body: ChatRequest) -> list[int]:
    if service.template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions")
    text = service.template.render(
        [message.plain() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    return service.codec.encode(text, add_special_tokens=False)
