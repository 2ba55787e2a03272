"""GET /docs: /openapi.json as one page for people: plain HTML, no script, nothing from afar."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font: 600 1.1rem ui-monospace, monospace; margin-top: 2.5rem }
table { border-collapse: collapse; width: 100% } caption { text-align: left; color: #666 }
td { border-top: 1px solid #ddd; padding: .2rem .6rem; vertical-align: top }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap }
b { color: #06c }
"""
# No page that somebody slipped in here may run a script either.
_POLICY = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def router(app: FastAPI) -> APIRouter:
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers=_POLICY)

    return routes


def docs_page(spec: dict[str, Any]) -> str:
    """Return a page with each operation, its fields and its answers."""
    title = escape(f"{spec['info']['title']} {spec['info']['version']}")
    sections = "".join(
        _operation(spec, method, path, operation)
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        '<p>For programs: <a href="openapi.json">openapi.json</a>. A field that is left out, or '
        f"null, has its default.</p>{sections}</html>"
    )


def _operation(spec: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary", "")
    parts = [f"<h2><b>{method.upper()}</b> {escape(path)}</h2><p>{escape(about)}</p>"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        parts.append(_table("Request", _fields(spec, body["schema"])))
    answer = operation["responses"].get("200", {}).get("content", {}).get("application/json", {})
    if answer.get("schema"):
        parts.append(_table("Answer", _fields(spec, answer["schema"])))
    return "".join(parts)


def _table(caption: str, rows: Iterator[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(kind)}</td></tr>" for name, kind in rows
    )
    return f"<table><caption>{caption}</caption>{cells}</table>"


def _fields(spec: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, type) of the fields of an object."""
    named = _resolved(spec, schema)
    required = named.get("required", ())
    for name, field in named.get("properties", {}).items():
        yield name, _kind(spec, field) + (", required" if name in required else "")


def _resolved(spec: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _kind(spec: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a type in words, with its bounds."""
    if "anyOf" in schema:
        kinds = [_kind(spec, one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum") or [schema["const"]]))
    words = str(schema.get("type", "anything"))
    if words == "array":
        words = f"list of ({_kind(spec, schema.get('items', {}))})"
    names = {
        "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than", "maxLength": "length at most", "maxItems": "no more than",

    }  # fmt: skip
    bounds = [f"{said} {schema[name]}" for name, said in names.items() if name in schema]
    return ", ".join([words, *bounds])
