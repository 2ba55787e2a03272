"""The operators' plane: an application of its own, for a port of its own on loopback.

POST /admin/drain lets the server run empty; GET /debug/state shows what the schedulers hold
and who was let in, for people who look for a fault.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from serving.api.app import bare_app
from serving.api.responses import json_response
from serving.api.service import Service
from serving.ports import PortRules

_TIMEOUT_S = 5.0


def create_admin_app(service: Service, rules: PortRules) -> FastAPI:
    return bare_app("Hocket's admin plane", [_router(service)], service, rules)


def _router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/admin/drain", status_code=202)
    async def drain() -> Response:
        """Refuse new requests from now on; those accepted run to their end, however long it takes.

        Ask again to see how many are left: 202 while there are some, then 200. The process stays:
        end it with SIGTERM.
        """
        num_open = service.driver.begin_drain()
        status = "draining" if num_open else "drained"
        answer = {"status": status, "num_requests": num_open}
        return json_response(answer, 202 if num_open else 200)

    @routes.get("/debug/state")
    async def state() -> Response:
        """Return plain data of no fixed form; no token and no text of a request is in it."""
        shown = await service.driver.inspect(_TIMEOUT_S)
        return json_response(shown | {"admission": service.admission.state()})

    return routes
