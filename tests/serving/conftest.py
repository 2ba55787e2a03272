"""One Ray session of this machine for all tests that need no more than one that is well."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from tests.serving.ray_sessions import Started
from tests.serving.test_process import is_gone


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """It is started where files with our names lie, of which nothing may be run."""
    foreign = tmp_path_factory.mktemp("foreign")
    for name in ("engine", "serving", "msgspec", "ray"):
        (foreign / f"{name}.py").write_text("raise SystemExit('this is not for you')\n")
    with asyncio.Runner() as runner:
        with contextlib.chdir(foreign):
            started = Started(runner)
        yield started
        pids = started.pids()
        started.stop()
        assert pids
        assert [command for pid, command in pids.items() if not is_gone(pid)] == []
        assert not started.folder.exists(), "logs are kept if something went wrong"
