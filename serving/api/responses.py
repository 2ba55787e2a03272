"""JSON answers, encoded by msgspec: several times faster than the standard library."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

_encoder = msgspec.json.Encoder()
_LONG_LIST = 64


def json_response(
    value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(_encoder.encode(value), status, headers=headers, media_type="application/json")


def in_pieces(value: Any) -> msgspec.Raw:
    """Encode what may be megabytes, a list's item at a time: in between other threads run."""
    return msgspec.Raw(_encoder.encode(_with_encoded_items(value)))


def _with_encoded_items(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_encoded_items(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > _LONG_LIST:
        return [msgspec.Raw(_encoder.encode(item)) for item in value]
    return value
