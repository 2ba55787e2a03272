"""POST /v1/chat/completions: messages in, a message out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from scheduler.types import SamplingParams
from serving.api import answers
from serving.api.gate import pass_of
from serving.api.logprobs import chat_logprobs
from serving.api.request_id import request_id_of
from serving.api.sampling import sampling_params
from serving.api.schemas import ChatRequest
from serving.api.service import Service
from serving.cluster.streams import Delta, RequestStream
from serving.errors import InvalidRequest
from serving.text.tokenizer import TextCodec


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create(body: ChatRequest, request: Request) -> Response:
        service.check(body)
        token_ids, params = await asyncio.to_thread(_prepare, service, body)
        request_id = request_id_of(request)
        group = service.generate(
            body,
            [token_ids],
            params,
            request_id=request_id,
            entry=pass_of(request),
            param="messages",
            default_max_tokens=None,
        )
        head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),  # noqa: TID251 (the API's field is wall-clock time)
            "model": service.model_name,
        }
        form = _ChatForm(service.codec, body.num_logprobs())
        return await answers.respond(service, request, body, group, head, form)

    return routes


def _prepare(service: Service, body: ChatRequest) -> tuple[list[int], SamplingParams]:
    """Render, tokenize and check; takes long for long prompts. Raises InvalidRequest."""
    if service.template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions")
    text = service.template.render(
        [message.plain() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    token_ids = service.codec.encode(text, add_special_tokens=False)
    return token_ids, sampling_params(body, service.codec)


@dataclass(frozen=True, slots=True)
class _ChatForm:
    """A message, or what is new of it, and its scores."""

    codec: TextCodec
    num_logprobs: int | None

    def whole(self, index: int, delta: Delta, stream: RequestStream) -> dict[str, Any]:  # noqa: ARG002
        message = {"role": "assistant", "content": delta.text}
        return {"message": message, "logprobs": self._logprobs(delta)}

    def chunk(
        self,
        index: int,  # noqa: ARG002
        delta: Delta,
        stream: RequestStream,  # noqa: ARG002
        *,
        first: bool,
    ) -> dict[str, Any]:
        # The role comes with the first token: clients measure TTFT at the first chunk.
        role = {"role": "assistant"} if first else {}
        return {"delta": role | {"content": delta.text}, "logprobs": self._logprobs(delta)}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        return chat_logprobs(delta.scored, self.num_logprobs, self.codec)
