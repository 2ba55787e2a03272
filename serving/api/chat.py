"""POST /v1/chat/completions: messages in, a message out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from scheduler.types import SamplingParams
from serving.api import answers
from serving.api.answer_schemas import ChatCompletion, answered_with
from serving.api.gate import pass_of
from serving.api.json_limits import JsonRoute
from serving.api.logprobs import chat_logprobs
from serving.api.prompts import chat_ids, truncated
from serving.api.request_id import take_request_id
from serving.api.sampling import sampling_params
from serving.api.schemas import ChatRequest
from serving.api.service import Service
from serving.cluster.streams import Delta, RequestStream
from serving.text.tokenizer import TextCodec


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/chat/completions", responses=answered_with(ChatCompletion, streams=True))
    async def create(body: ChatRequest, request: Request) -> Response:
        """Answer the messages, whole or as a stream of events."""
        service.check(body)
        token_ids, params = await asyncio.to_thread(_prepare, service, body)
        ids = take_request_id(request, body.request_id)
        group = service.generate(
            body,
            [token_ids],
            params,
            ids=ids,
            entry=pass_of(request),
            param="messages",
            default_max_tokens=None,
        )
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = service.head(f"chatcmpl-{ids.shown}", kind)
        form = _ChatForm(service.codec, body)
        return await answers.respond(service, request, group, head, form)

    return routes


def _prepare(service: Service, body: ChatRequest) -> tuple[list[int], SamplingParams]:
    token_ids = chat_ids(
        service.template,
        service.codec,
        body,
        add_special_tokens=bool(body.add_special_tokens),
    )
    token_ids = truncated(token_ids, body, service.ready.max_model_len)
    return token_ids, sampling_params(body, service.codec)


@dataclass(frozen=True, slots=True)
class _ChatForm:
    """A message, or what is new of it, and its scores."""

    codec: TextCodec
    body: ChatRequest

    def whole(self, index: int, delta: Delta, stream: RequestStream) -> dict[str, Any]:  # noqa: ARG002
        message = {"role": "assistant", "content": delta.text}
        return {"message": message, "logprobs": None} | self._logprobs(delta)

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
        return {"delta": role | {"content": delta.text}} | self._logprobs(delta)

    def of_all(self, stream: RequestStream) -> dict[str, Any]:
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": stream.spec.prompt_token_ids}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        num_top = self.body.num_logprobs()
        if num_top is None:
            return {}
        return {"logprobs": chat_logprobs(delta.scored, num_top, self.codec)}
