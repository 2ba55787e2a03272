"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from scheduler.types import SamplingParams
from serving.api import answers
from serving.api.answer_schemas import Completion, answered_with
from serving.api.gate import pass_of
from serving.api.headers import field
from serving.api.json_limits import JsonRoute
from serving.api.logprobs import completion_logprobs, score_prompt
from serving.api.prompts import Prompt, completion_prompts
from serving.api.request_id import take_request_id
from serving.api.sampling import sampling_params
from serving.api.schemas import CompletionRequest
from serving.api.service import Service
from serving.cluster.streams import Delta, RequestStream
from serving.text.tokenizer import TextCodec

# OpenAI's default, which vLLM keeps.
DEFAULT_MAX_TOKENS = 16
_SHORT_BODY_BYTES = 2048


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", responses=answered_with(Completion, streams=True))
    async def create(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt, whole or as a stream of events."""
        service.check(body)
        if _is_short(request):
            prompts, params = _prepare(service, body)
        else:
            prompts, params = await asyncio.to_thread(_prepare, service, body)
        ids = take_request_id(request, body.request_id)
        group = service.generate(
            body,
            [prompt.token_ids for prompt in prompts],
            params,
            ids=ids,
            entry=pass_of(request),
            param="prompt",
            default_max_tokens=DEFAULT_MAX_TOKENS,
        )
        head = service.head(f"cmpl-{ids.shown}", "text_completion")
        form = _CompletionForm(service.codec, body, prompts)
        return await answers.respond(service, request, group, head, form)

    return routes


def _is_short(request: Request) -> bool:
    """Whether to make tokens of it takes less time than to hand it to a thread and back."""
    size = field(request.scope, b"content-length")
    return size.isdecimal() and int(size) <= _SHORT_BODY_BYTES


def _prepare(service: Service, body: CompletionRequest) -> tuple[list[Prompt], SamplingParams]:
    prompts = completion_prompts(
        body,
        service.codec,
        max_num_prompts=service.config.max_num_prompts,
        max_model_len=service.ready.max_model_len,
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )
    return prompts, sampling_params(body, service.codec)


@dataclass(frozen=True, slots=True)
class _CompletionForm:
    """Text and its scores; with `echo` the prompt and its scores come before."""

    codec: TextCodec
    body: CompletionRequest
    prompts: Sequence[Prompt]

    def whole(self, index: int, delta: Delta, stream: RequestStream) -> dict[str, Any]:
        return {"logprobs": None} | self.chunk(index, delta, stream, first=True)

    def chunk(
        self, index: int, delta: Delta, stream: RequestStream, *, first: bool
    ) -> dict[str, Any]:
        body = self.body
        choice: dict[str, Any] = {"text": delta.text}
        echoed = self.prompts[index // (body.n or 1)].text
        if first and body.echo:
            choice["text"] = echoed + delta.text
        if body.logprobs is not None:
            tokens = [
                token._replace(text_offset=token.text_offset + len(echoed))
                for token in delta.scored
            ]
            if first and body.echo:
                prompt_ids = stream.spec.prompt_token_ids
                tokens = score_prompt(prompt_ids, stream.prompt_logprobs, self.codec) + tokens
            choice["logprobs"] = completion_logprobs(tokens, body.logprobs, self.codec)
        if first and body.return_token_ids:
            choice["prompt_token_ids"] = stream.spec.prompt_token_ids
        return choice

    def of_all(self, stream: RequestStream) -> dict[str, Any]:  # noqa: ARG002
        return {}
