"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from scheduler.types import SamplingParams
from serving.api import answers
from serving.api.gate import pass_of
from serving.api.logprobs import completion_logprobs, score_prompt
from serving.api.request_id import request_id_of
from serving.api.sampling import check_ids, sampling_params
from serving.api.schemas import CompletionRequest
from serving.api.service import Service
from serving.cluster.streams import Delta, RequestStream
from serving.errors import InvalidRequest
from serving.text.tokenizer import TextCodec

# OpenAI's default, which vLLM keeps.
DEFAULT_MAX_TOKENS = 16


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create(body: CompletionRequest, request: Request) -> Response:
        service.check(body)
        prompts, params = await asyncio.to_thread(_prepare, service, body)
        request_id = request_id_of(request)
        group = service.generate(
            body,
            [prompt.token_ids for prompt in prompts],
            params,
            request_id=request_id,
            entry=pass_of(request),
            param="prompt",
            default_max_tokens=DEFAULT_MAX_TOKENS,
        )
        head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),  # noqa: TID251 (the API's field is wall-clock time)
            "model": service.model_name,
        }
        form = _CompletionForm(service.codec, body, prompts)
        return await answers.respond(service, request, body, group, head, form)

    return routes


@dataclass(frozen=True, slots=True)
class _Prompt:
    token_ids: Sequence[int]
    text: str  # to be echoed; empty if it is not


def _prepare(service: Service, body: CompletionRequest) -> tuple[list[_Prompt], SamplingParams]:
    """Tokenize and check; takes long for long prompts. Raises InvalidRequest."""
    given = body.prompts()
    limit = service.config.max_num_prompts
    if not 1 <= len(given) <= limit:
        raise InvalidRequest(f"prompt must hold 1 to {limit} prompts", param="prompt")
    codec, prompts = service.codec, []
    for prompt in given:
        if isinstance(prompt, str):
            token_ids = codec.encode(prompt, add_special_tokens=True)
            prompts.append(_Prompt(token_ids, prompt if body.echo else ""))
        else:
            check_ids(prompt, codec, "prompt")
            prompts.append(_Prompt(prompt, codec.decode(prompt) if body.echo else ""))
    return prompts, sampling_params(body, codec)


@dataclass(frozen=True, slots=True)
class _CompletionForm:
    """Text and its scores; with `echo` the prompt and its scores come before."""

    codec: TextCodec
    body: CompletionRequest
    prompts: Sequence[_Prompt]

    def whole(self, index: int, delta: Delta, stream: RequestStream) -> dict[str, Any]:
        return self.chunk(index, delta, stream, first=True)

    def chunk(
        self, index: int, delta: Delta, stream: RequestStream, *, first: bool
    ) -> dict[str, Any]:
        echoed = self.prompts[index // (self.body.n or 1)].text
        choice: dict[str, Any] = {"text": delta.text, "logprobs": None}
        tokens = [
            token._replace(text_offset=token.text_offset + len(echoed)) for token in delta.scored
        ]
        if first and self.body.echo:
            choice["text"] = echoed + delta.text
            if self.body.logprobs is not None:
                prompt_ids = stream.spec.prompt_token_ids
                tokens = score_prompt(prompt_ids, stream.prompt_logprobs, self.codec) + tokens
        if self.body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(tokens, self.body.logprobs, self.codec)
        return choice
