"""The planted bugs of `make mutants` still fit the code: one that does not is planted no more."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_patch_applies():
    patches = sorted((ROOT / "tests/mutants").glob("*.patch"))
    assert patches
    misfits = [
        patch.name
        for patch in patches
        if subprocess.run(
            ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, check=False
        ).returncode
    ]
    assert not misfits
