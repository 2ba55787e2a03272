"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokenizer, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.api.answer_schemas import Detokenized, Tokenized, TokenizerInfo, answered_with
from serving.api.json_limits import JsonRoute
from serving.api.known_fields import first_on
from serving.api.prompts import chat_ids
from serving.api.responses import json_response
from serving.api.sampling import check_ids
from serving.api.schemas import DetokenizeRequest, TokenizeRequest
from serving.api.service import Service
from serving.api.turns import Turns
from serving.errors import InvalidRequest

_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)
    turns = Turns(service.metrics, service.config.admission.tenant_share)

    @routes.post("/tokenize", responses=answered_with(Tokenized))
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the token ids of a prompt, or of messages as the model would see them."""
        service.check_names(body)
        async with turns.one(request):
            value = await asyncio.to_thread(_tokenized, service, body)
        return json_response(value)

    @routes.post("/detokenize", responses=answered_with(Detokenized))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of token ids, special tokens included."""
        service.check_names(body)
        async with turns.one(request):
            value = await asyncio.to_thread(_detokenized, service, body)
        return json_response(value)

    @routes.get("/tokenizer_info", responses=answered_with(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Return what tokenizer_config.json says: special tokens and the chat template."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": service.codec.vocab_size,
                "model_max_length": service.ready.max_model_len,
                **{name: service.codec.special_tokens.get(name) for name in names},
                "chat_template": service.codec.template,
            }
        )

    return routes


def _tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    codec = service.codec
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        of_messages = first_on({name: getattr(body, name) for name in _OF_MESSAGES})
        if of_messages is not None:
            raise InvalidRequest(
                f"{of_messages} needs messages: a prompt is tokenized as it is", param=of_messages
            )
        adds = body.add_special_tokens is not False
        token_ids = codec.encode(body.prompt, add_special_tokens=adds)
    else:
        adds = bool(body.add_special_tokens)
        token_ids = chat_ids(service.template, codec, body.chat(), add_special_tokens=adds)
    pieces = [codec.piece(token_id) for token_id in token_ids] if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": service.ready.max_model_len,
        "tokens": token_ids,
        "token_strs": pieces,
    }


def _detokenized(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    check_ids(body.tokens, service.codec, "tokens")
    return {"prompt": service.codec.decode_long(body.tokens, skip_special_tokens=False)}
