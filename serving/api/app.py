"""The ASGI application: routes, middleware, and the one map from errors to HTTP."""

from __future__ import annotations

import logging
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from serving.api import chat, completions, debug, models
from serving.api.answers import ClientGone
from serving.api.body_limit import BodyLimit
from serving.api.gate import Gate
from serving.api.request_id import RequestIds
from serving.api.responses import json_response
from serving.api.service import Service
from serving.errors import InvalidRequest, RequestError

log = logging.getLogger(__name__)

# Echoed input is cut: a small body must not make a large answer.
_MAX_ERRORS = 5
_MAX_MESSAGE_CHARS = 200


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Hocket",
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(RequestIds),
            Middleware(BodyLimit, max_bytes=service.config.max_body_bytes),
            Middleware(
                Gate,
                admission=service.admission,
                driver=service.driver,
                on_refused=partial(service.metrics.ended, "rejected", 0, 0.0),
            ),
        ],
    )
    for module in (completions, chat, models, debug):
        app.include_router(module.router(service))
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _internal_error)
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
        problems.append(f"{params[-1] or 'body'}: {problem['msg']}"[:_MAX_MESSAGE_CHARS])
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


async def _internal_error(_: Request, error: Exception) -> Response:
    log.error("a request failed inside the server", exc_info=error)
    refusal = RequestError("the server failed on this request; its log says why")
    return json_response(refusal.body(), refusal.status)
