"""Every route needs a key, where there are keys, but those that are marked `public`.

Default-deny: unknown paths, other methods and odd spellings of paths are refused before anything
else is said about them. Whether a route is public is asked of the route that will serve the
request, never of the text of a path. Sets `state["tenant"]` of the scope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.headers import is_plain
from serving.api.refusal import refuse
from serving.errors import HostNotAllowed, RequestError, Unauthorized
from serving.keys import DEFAULT_TENANT
from serving.ports import PortRules, is_local_address

_MARK = "hocket_public"

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def public(endpoint: Endpoint) -> Endpoint:
    """Mark an endpoint that needs no key on loopback: what probes and local Prometheus ask."""
    setattr(endpoint, _MARK, True)
    return endpoint


class Authenticate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, rules: PortRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["tenant"] = self._admit(scope)
            except RequestError as error:
                await refuse(error, scope, receive, send)
                return
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> str:
        """Return the tenant. Raises Unauthorized, HostNotAllowed."""
        headers = Headers(scope=scope)
        tenant = self._rules.tenant_of(_bearer(headers))
        if self._rules.keys is not None and tenant is None and not _open_to_all(scope):
            raise Unauthorized
        self._check_host(headers, has_key=tenant is not None)
        return tenant or DEFAULT_TENANT

    def _check_host(self, headers: Headers, *, has_key: bool) -> None:
        host = headers.get("host", "")
        if not self._rules.allows_host(host, has_key=has_key):
            raise HostNotAllowed(
                "this server does not answer to the host name of this request; its operator can "
                "allow it with --allowed-hosts"
            )
        origin = headers.get("origin")
        if origin is not None and not has_key and not self._allows_origin(origin):
            raise HostNotAllowed(
                "this server does not answer to web pages of this origin; its operator can allow "
                "its host with --allowed-hosts"
            )

    def _allows_origin(self, origin: str) -> bool:
        """A page's own requests to loopback carry an honest Host, but its Origin tells."""
        return self._rules.allows_host(_netloc(origin), has_key=False)


def _bearer(headers: Headers) -> str:
    """Return the key that the request shows, empty if there is none or more than one."""
    given = headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip(" ") if scheme.lower() == "bearer" else ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _open_to_all(scope: Scope) -> bool:
    """Whether the request goes to a public route, over a connection that never left the machine.

    The routes are walked as the router walks them, so the answer is about the one that will serve.
    """
    if not is_local_address((scope.get("server") or ("",))[0]) or not is_plain(scope["path"]):
        return False
    for route in scope["app"].routes:
        if route.matches(scope)[0] is Match.FULL:
            return getattr(getattr(route, "endpoint", None), _MARK, False) is True
    return False
