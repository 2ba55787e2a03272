"""Heads of requests are bounded, and say plainly how long the body is and what it is made of."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.refusal import refuse
from serving.errors import (
    HeadersTooLarge,
    InvalidRequest,
    NotFound,
    RequestError,
    UnsupportedMedia,
)

MAX_FIELDS = 100
MAX_BYTES = 64 << 10  # of names and values together, and of the target

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # what terminals obey; the tab is allowed


class HeaderLimits:
    """ASGI middleware. The HTTP parser has refused what is no HTTP, and heads that never end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = _problem(scope)
            if error is not None:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


class PlainPaths:
    """ASGI middleware: what no route is called gets 404 here, whatever a pattern makes of it.

    A `$` also matches before a newline at the end. It comes after the keys: to who has none, all
    paths are alike.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_plain(scope["path"]):
            await refuse(NotFound("Not Found", code="not_found"), scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_plain(path: str) -> bool:
    """Whether a decoded path has no control character, as those of all routes."""
    return _CONTROL.search(path.encode()) is None and "\t" not in path


def field(scope: Scope, name: bytes) -> str:
    """Return the first header field of this name, in lower case; empty if there is none.

    Each request asks for several, and needs no mapping for that.
    """
    for known, value in scope["headers"]:
        if known == name:
            return str(value, "latin-1")
    return ""


def _problem(scope: Scope) -> RequestError | None:
    fields = scope["headers"]
    text = b"".join([part for name_and_value in fields for part in name_and_value])
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"]) + len(text)
    if len(fields) > MAX_FIELDS or num_bytes > MAX_BYTES:
        return HeadersTooLarge(
            f"a request may have {MAX_FIELDS} header fields, and {MAX_BYTES} bytes of them and the "
            "path together"
        )
    if scope["http_version"] not in ("1.0", "1.1"):
        return InvalidRequest("this server speaks HTTP/1.1")
    if _CONTROL.search(text):
        return InvalidRequest("a header field holds a control character")
    names = [name for name, _ in fields]
    if b"transfer-encoding" in names and b"content-length" in names:
        # A proxy may believe one and we the other: the rest would be read as another's request.
        return InvalidRequest("a body has a Content-Length or a Transfer-Encoding, not both")
    if field(scope, b"content-encoding").strip().lower() not in ("identity", ""):
        return UnsupportedMedia("compressed bodies are not accepted; send it as it is")
    return None
