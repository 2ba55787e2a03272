"""Answers to requests whose body nobody will read, so that the client sees the answer."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from serving.api.responses import json_response
from serving.errors import RequestError

# What may still come before the connection is closed. A socket closed while bytes arrive is reset,
# and the client may never see why.
_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20


async def refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error. What remains of a body is dropped, and then the connection."""
    headers = Headers(scope=scope)
    if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        await json_response(error.body(), error.status, error.headers())(scope, receive, send)
        return
    response = json_response(error.body(), error.status, error.headers() | {"connection": "close"})

    async def send_open(message: Message) -> None:
        ends = message["type"] == "http.response.body"
        await send({**message, "more_body": True} if ends else message)

    await response(scope, receive, send_open)
    if headers.get("expect", "").lower() != "100-continue":  # who asks first has sent nothing yet
        await _drop(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop(receive: Receive) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(_LINGER_S):
            while num_bytes < _LINGER_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass
