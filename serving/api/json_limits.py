"""JSON bodies, read strictly: what parsers disagree about, or choke on, is refused with 400.

Refused: nesting deeper than 64, checked before parsing; NaN and infinities; duplicate names; lone
surrogates; integers beyond 2^53, but for `seed`, which is 64 bits wide. What fields may hold is the
schemas' business.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
from collections.abc import Callable, Coroutine
from email.message import Message
from functools import lru_cache
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.headers import field
from serving.errors import InvalidRequest, UnsupportedMedia

MAX_DEPTH = 64
MAX_INTEGER = 1 << 53  # beyond it JavaScript, and much else, reads another number
_WIDE_FIELDS = {"seed"}

# Longer bodies are parsed on a thread.
_LONG_BYTES = 64 << 10

# A string, or an open end of one; possessive, so that no body makes it look twice.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
# Only such bodies can hold what is checked value by value.
_ODD_NUMBER = re.compile(rb"[0-9]{16}|[0-9][eE]|NaN|Infinity")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, is strict JSON. Raises InvalidRequest for others.

    Where a body is optional there is either none or JSON, and `null` is not none. An endpoint of
    nothing but a body and its request is called as soon as the body is valid: what FastAPI does in
    between (dependencies, forms, files) has nothing to do there, and takes long beside the rest.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        super().__init__(path, endpoint, **settings)
        takes = list(inspect.signature(endpoint).parameters)
        is_optional = self.body_field is None or not self.body_field.field_info.is_required()
        if takes == ["body", "request"] and not (is_optional or self.dependencies):
            self.app = self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # `BodyLimit` has read it, and hands it on in one piece.
        value = await _strict_json(scope, (await receive())["body"])
        assert self.body_field is not None
        body, errors = self.body_field.validate(value, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        response: Response = await self.endpoint(body, Request(scope, receive))
        await response(scope, receive, send)

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        is_optional = not self.body_field.field_info.is_required()

        async def handle_json(request: Request) -> Response:
            parsed = _ParsedRequest(request.scope, request.receive)
            body = await parsed.body()
            if is_optional and not body:
                return await handle(parsed)
            parsed.value = await _strict_json(request.scope, body)
            if is_optional and parsed.value is None:
                raise InvalidRequest("the body is null: send an object, or nothing at all")
            return await handle(parsed)

        return handle_json


class _ParsedRequest(Request):
    """FastAPI asks a request for its JSON."""

    value: Any = None

    async def json(self) -> Any:
        return self.value


async def _strict_json(scope: Scope, body: bytes) -> Any:
    _check_content_type(field(scope, b"content-type"))
    if len(body) > _LONG_BYTES:
        return await asyncio.to_thread(parse_json, body)
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """Return what the body says. Raises InvalidRequest."""
    outside_strings = _STRINGS.sub(b"", body)
    _check_depth(outside_strings)
    try:
        value = _decoder.decode(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8, at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg}, at character {error.pos}"
        ) from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise InvalidRequest(f"an integer is beyond {MAX_INTEGER}") from None
    if _ODD_NUMBER.search(outside_strings) or _SURROGATE.search(body):
        _check_values(value)
    return value


@lru_cache(maxsize=64)
def _check_content_type(header: str) -> None:
    message = Message()
    message["content-type"] = header
    subtype = message.get_content_subtype()
    charset = message.get_param("charset", "utf-8")
    if (
        message.get_content_maintype() != "application"
        or not (subtype == "json" or subtype.endswith("+json"))
        or str(charset).lower() not in ("utf-8", "utf8")
    ):
        raise UnsupportedMedia("the body must be JSON in UTF-8: send Content-Type application/json")


def _check_depth(outside_strings: bytes) -> None:
    """Cut off the innermost pairs of brackets, round by round: each takes one level."""
    brackets = outside_strings.translate(_BRACKETS, _NO_BRACKETS)
    if brackets.count(b"[") <= MAX_DEPTH:
        return
    for _ in range(MAX_DEPTH):
        before, brackets = brackets, brackets.replace(b"[]", b"")
        if not brackets:
            return
        if len(brackets) == len(before):
            break
    raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels, or not closed")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequest(f"the name {name[:40]!r} comes twice in one object")
            seen.add(name)
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique_names)


def _check_values(value: Any) -> None:
    """Raise InvalidRequest for a number or a text that is none, and name the top-level field."""
    fields = value.items() if isinstance(value, dict) else [("", value)]
    for name, content in fields:
        problem = _problem(name, wide=False)
        problem = problem or _problem(content, wide=name in _WIDE_FIELDS)
        if problem:
            shown = name.encode("utf-8", "backslashreplace").decode()[:40]
            raise InvalidRequest(f"{shown or 'body'}: {problem}", param=shown or None)


def _problem(value: Any, *, wide: bool) -> str | None:
    """Return what is wrong with it, None if nothing is."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return "half of a surrogate pair is not a character"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return "the number is not finite"
        elif isinstance(item, int):
            if abs(item) > MAX_INTEGER and not (wide and item is value):
                return f"an integer is beyond {MAX_INTEGER}"
        elif isinstance(item, dict):
            rest.extend(item)
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
    return None
