"""Which version of hocket this is: one place that knows."""

from __future__ import annotations

from functools import cache


@cache
def version() -> str:
    """Return it as the package says; `unknown` in a folder of sources that nobody installed."""
    from importlib import metadata  # it is slow, and few need it

    try:
        return metadata.version("hocket")
    except metadata.PackageNotFoundError:
        return "unknown"
