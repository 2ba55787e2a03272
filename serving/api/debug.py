"""GET /debug/state: what the schedulers hold, for people who look for a fault. Off by default."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from serving.api.responses import json_response
from serving.api.service import Service
from serving.errors import NotFound

_TIMEOUT_S = 5.0


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/debug/state")
    async def show_state() -> Response:
        """Return plain data of no fixed form; no token and no text of a request is in it."""
        if not service.config.debug_endpoints:
            raise NotFound(
                "/debug/state is off; start the server with --debug-endpoints", code="not_found"
            )
        state = await service.driver.inspect(_TIMEOUT_S)
        return json_response(state | {"admission": service.admission.state()})

    return routes
