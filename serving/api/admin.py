"""The operators' plane: an application of its own, for a port of its own on loopback.

It shows what the fleet and the schedulers hold, and hands on what operators ask of them: a drain,
another number of instances, a rolling restart. A change is begun here and never waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from serving.api.app import bare_app
from serving.api.json_limits import JsonRoute
from serving.api.responses import json_response
from serving.api.service import Service
from serving.api.version import VERSION
from serving.cluster.change import Change
from serving.cluster.fleet import Fleet
from serving.errors import InvalidRequest
from serving.ports import PortRules

_TIMEOUT_S = 5.0


class _Scale(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    instances: Annotated[int, Field(ge=1)]


class _Drain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    instance: Annotated[str, Field(min_length=1, max_length=100)] = ""  # none: the whole server


class _Restart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def create_admin_app(
    service: Service,
    fleet: Fleet,
    rules: PortRules,
    session: Mapping[str, Any] | None = None,
) -> FastAPI:
    """`session` is what operators want to know of the Ray session, if there is one."""
    routers = [_fleet_routes(service, fleet, session), _debug_routes(service)]
    return bare_app("Hocket's admin plane", routers, service, rules)


def _fleet_routes(service: Service, fleet: Fleet, session: Mapping[str, Any] | None) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, dependencies=[Depends(_no_query)])

    @routes.get("/admin/status")
    async def status() -> Response:
        """Return each instance and its load, what waits, and the change that is under way."""
        driver = service.driver
        answer = {
            "model": service.model_name,
            "version": VERSION,
            "is_draining": driver.draining,
            "num_requests": driver.num_streams,
            "num_queued": driver.num_queued,
            "session": None if session is None else dict(session),
        }
        return json_response(answer | fleet.state())

    @routes.post("/admin/scale", status_code=202)
    async def scale(body: _Scale) -> Response:
        """Have so many instances from now on; asked again meanwhile, the last number counts."""
        return _begun(fleet.scale(body.instances))

    @routes.post("/admin/restart", status_code=202)
    async def restart(_: _Restart | None = None) -> Response:
        """Renew all instances, one after the other: each drains, ends and starts again."""
        return _begun(fleet.restart())

    @routes.post("/admin/drain", status_code=202)
    async def drain(body: _Drain | None = None) -> Response:
        """Refuse new requests from now on; those accepted run to their end, however long it takes.

        Ask again to see how many are left: 202 while there are some, then 200. The process stays:
        end it with SIGTERM. With an `instance`, only that one gets no new requests, until it is
        restarted; ask again: 202 while it has some, then 200.
        """
        if body is not None and body.instance:
            change = fleet.drain(body.instance)
            return _begun(change) if change else json_response({"status": "drained"})
        num_open = service.driver.begin_drain()
        status = "draining" if num_open else "drained"
        answer = {"status": status, "num_requests": num_open}
        return json_response(answer, 202 if num_open else 200)

    return routes


def _debug_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/debug/state")
    async def state() -> Response:
        """Return plain data of no fixed form; no token and no text of a request is in it."""
        shown = await service.driver.inspect(_TIMEOUT_S)
        return json_response(shown | {"admission": service.admission.state()})

    return routes


def _no_query(request: Request) -> None:
    """Refuse what would be passed over: a drain of `?instance=...` would be of all."""
    if request.query_params:
        name = next(iter(request.query_params))[:100]
        raise InvalidRequest(f"{name}: it belongs into the body, which is JSON", param=name)


def _begun(change: Change) -> Response:
    return json_response({"status": "begun", "change": change.state()}, 202)
