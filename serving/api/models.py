"""GET /v1/models and what operators and load balancers ask: /health, /ready, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from serving.api.auth import public
from serving.api.responses import json_response
from serving.api.service import Service
from serving.errors import NotFound
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
            "max_model_len": service.ready.max_model_len,
        }

    @routes.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @routes.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        if model != service.model_name:
            raise NotFound(
                f"The model {model!r} does not exist; this server has: {service.model_name}",
                param="model",
            )
        return json_response(card())

    @routes.get("/health")
    @public
    async def health() -> Response:
        """Return 200 while an instance is up: also when draining or full, which is no illness."""
        return Response(status_code=200 if service.driver.alive else 503)

    @routes.get("/ready")
    @public
    async def ready() -> Response:
        """Return 200 only when a request sent now would be served."""
        if service.driver.ready:
            return json_response({"status": "ready"})
        status = "draining" if service.driver.draining else "no instance"
        return json_response({"status": status}, 503, {"retry-after": "1"})

    @routes.get("/metrics")
    @public
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return routes
