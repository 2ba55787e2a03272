"""One Ray session of this machine for all tests that need no more than one that is well."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.serving.ray_sessions import Started


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Started]:
    with asyncio.Runner() as runner:
        started = Started(runner)
        yield started
        started.stop()
