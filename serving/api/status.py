"""What monitors ask, in vLLM's shapes: GET /version, GET /load, and /ping for Amazon SageMaker."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from serving.api.answer_schemas import EMPTY, Load, Version, answered_with
from serving.api.auth import public
from serving.api.models import alive
from serving.api.responses import json_response
from serving.api.service import Service
from serving.api.version import VERSION


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/version", responses=answered_with(Version))
    async def version() -> Response:
        """Return the version of this program."""
        return json_response({"version": VERSION})

    @routes.get("/load", responses=answered_with(Load))
    async def load() -> Response:
        """Return how many requests have not ended, each choice counted."""
        return json_response({"server_load": service.driver.num_streams})

    @routes.head("/ping", include_in_schema=False)
    @routes.get("/ping", responses=EMPTY, response_class=Response, operation_id="get_ping")
    @routes.post("/ping", responses=EMPTY, response_class=Response, operation_id="post_ping")
    @public
    async def ping() -> Response:
        """Return what /health does."""
        return alive(service)

    return routes
