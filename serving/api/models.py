"""GET /v1/models and what operators and load balancers ask: /health, /ready, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from serving.api.answer_schemas import EMPTY, ModelCard, ModelList, Status, answered_with
from serving.api.auth import public
from serving.api.responses import json_response
from serving.api.service import Service
from serving.errors import NotFound, Unavailable
from serving.metrics import CONTENT_TYPE


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def card() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.started_at,
            "owned_by": "hocket",
            "root": service.model_name,
            "parent": None,
            # One number under the names that vLLM's clients and LiteLLM look for.
            **dict.fromkeys(
                ("max_model_len", "context_length", "max_input_tokens", "max_output_tokens"),
                service.ready.max_model_len,
            ),
        }

    @routes.get("/v1/models", responses=answered_with(ModelList))
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @routes.get("/v1/models/{model:path}", responses=answered_with(ModelCard))
    async def get_model(model: str) -> Response:
        if model != service.model_name:
            raise NotFound(
                f"The model {model[:200]!r} does not exist; this server has: {service.model_name}",
                param="model",
            )
        return json_response(card())

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses=EMPTY, response_class=Response)
    @public
    async def health() -> Response:
        """Return 200 while an instance is up: also when draining or full, which is no illness."""
        return alive(service)

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready", responses={503: {"model": Status}, **answered_with(Status)})
    @public
    async def ready() -> Response:
        """Return 200 only when a request sent now would be served."""
        if service.driver.ready:
            return json_response({"status": "ready"})
        status = "draining" if service.driver.draining else "no instance"
        return json_response({"status": status}, 503, _later(service))

    @routes.head("/metrics", include_in_schema=False)
    @routes.get("/metrics", response_class=PlainTextResponse)
    @public
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @routes.head("/metrics/vllm", include_in_schema=False)
    @routes.get("/metrics/vllm")
    @public
    async def metrics_vllm() -> Response:
        """The same numbers under vLLM's names, which gateways and existing dashboards read."""
        return Response(service.metrics.render_vllm(), headers={"content-type": CONTENT_TYPE})

    return routes


def alive(service: Service) -> Response:
    """Return 200 while an instance is up, 503 with when to ask again while none is."""
    if service.driver.alive:
        return Response()
    return Response(status_code=503, headers=_later(service))


def _later(service: Service) -> dict[str, str]:
    return Unavailable("", retry_after_s=service.driver.up_in_s).headers()
