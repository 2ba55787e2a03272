"""Bodies are JSON and say so: a web page cannot send that to another site unasked."""

from __future__ import annotations

from fastapi import Request

from serving.errors import WrongMediaType


async def json_only(request: Request) -> None:
    """Raise WrongMediaType unless the body is declared as JSON."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise WrongMediaType("the content type must be application/json")
