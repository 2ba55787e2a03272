"""The version of this program, as it was installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("hocket")
    except PackageNotFoundError:  # run from a folder
        return "0+unknown"


VERSION = _installed()
