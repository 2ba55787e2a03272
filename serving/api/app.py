"""The ASGI application: routes, middleware, and the one map from errors to HTTP."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from serving.api import chat, completions, docs_page, models, status, tokenize
from serving.api.access import Access
from serving.api.answers import ClientGone
from serving.api.auth import Authenticate
from serving.api.body_limit import BodyLimit
from serving.api.faults import Faults
from serving.api.gate import Gate
from serving.api.headers import HeaderLimits, PlainPaths
from serving.api.request_id import RequestIds
from serving.api.responses import json_response
from serving.api.service import Service
from serving.api.version import VERSION
from serving.errors import InvalidRequest, RequestError
from serving.ports import PortRules
from serving.telemetry.table import Endpoint

# Echoed input is cut: a small body must not make a large answer.
_MAX_ERRORS = 5
_MAX_MESSAGE_CHARS = 200


def create_app(service: Service, rules: PortRules) -> FastAPI:
    routers = [
        _gated(completions.router(service), service, Endpoint.COMPLETIONS),
        _gated(chat.router(service), service, Endpoint.CHAT),
        tokenize.router(service),
        models.router(service),
        status.router(service),
    ]
    app = bare_app("Hocket", routers, service, rules)
    app.router.routes.extend(docs_page.router(app).routes)
    return app


def _gated(router: APIRouter, service: Service, endpoint: Endpoint) -> APIRouter:
    """Put what serves each route behind the gate: by route, whatever its path looks like."""
    for route in router.routes:
        assert isinstance(route, Route)
        route.app = Gate(route.app, service.admission, service.driver, service.metrics, endpoint)
    return router


def bare_app(
    title: str, routers: Iterable[APIRouter], service: Service, rules: PortRules
) -> FastAPI:
    """Return an application of these routes behind the bounds and the keys that every port has."""
    config = service.config
    app = FastAPI(
        title=title,
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be to whatever Host said
        # Whatever OpenTelemetry a library brings: our own metrics say what is to be known.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        middleware=[
            Middleware(Access, observe=service.metrics.http_answered),
            Middleware(RequestIds),
            Middleware(Faults),
            Middleware(HeaderLimits),
            Middleware(Authenticate, rules=rules),
            Middleware(PlainPaths),
            Middleware(
                BodyLimit,
                max_bytes=config.max_body_bytes,
                max_total_bytes=config.max_total_body_bytes,
                timeout_s=config.body_timeout_s,
            ),
        ],
    )
    for router in routers:
        # Not included but taken over: what serves a request is then to be found in `app.routes`.
        app.router.routes.extend(router.routes)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    return app


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return json_response(error.body(), error.status, error.headers())


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems, params = [], []
    for problem in error.errors()[:_MAX_ERRORS]:
        # The parts of `loc` that name a branch of a union are pydantic's, not the client's; for
        # JSON that cannot be read, `loc` is a position in the text.
        location = () if problem["type"] == "json_invalid" else problem["loc"][1:]
        where = [str(part) for part in location if _is_field(part)]
        params.append(".".join(where)[:_MAX_MESSAGE_CHARS])
        what = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{params[-1] or 'body'}: {what}"[:_MAX_MESSAGE_CHARS])
    refusal = InvalidRequest("; ".join(problems), param=params[0] or None)
    return json_response(refusal.body(), refusal.status)


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (
        part.replace("_", "").isalnum() and part not in _UNION_BRANCHES
    )


_UNION_BRANCHES = {"str", "int", "float", "bool", "ContentPart", "Message", "constrained_str"}


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}
    body = {
        "error": {
            "message": str(error.detail),
            "type": "invalid_request_error" if error.status_code < 500 else "server_error",
            "param": None,
            "code": codes.get(error.status_code, "http_error"),
        }
    }
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the code is nginx's for this case
