"""Run schemathesis against `hocket serve --fake`: `python -m tests.schema [--examples 300]`.

Its environment is made once, in the user's cache, since its dependencies are not ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.serving.servers import REPOSITORY, running_server

_VERSION = "4.32.5"
_CHECKS = "fails_honestly,unsupported_method"
# Short answers: it is the requests that count. Chat without max_tokens fills the window.
_SERVER = ("--fake", "--max-model-len", "256")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schema")
    parser.add_argument("--examples", type=int, default=300, help="requests made per operation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    program = _program()
    with tempfile.TemporaryDirectory() as folder, running_server(*_SERVER) as server:
        done = subprocess.run(
            [
                program, "run", f"{server.url}/openapi.json",
                "--max-examples", str(args.examples),
                "--checks", _CHECKS,
                "--seed", str(args.seed),
                "--mode", "all",
                "--phases", "examples,coverage,fuzzing",
                "--request-timeout", "30",
                "--continue-on-failure",
                "--suppress-health-check", "all",
                "--generation-database", "none",
            ],
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": "tests.schema.hooks", "PYTHONPATH": str(REPOSITORY)},
            cwd=folder,  # it leaves caches where it runs
            check=False,
        )  # fmt: skip
        if server.process.poll() is not None:
            print("the server is gone", file=sys.stderr)
            return 1
    return done.returncode


def _program() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "hocket" / "tools" / f"schemathesis-{_VERSION}"
    program = folder / "bin" / "schemathesis"
    if not program.exists():
        print(f"installing schemathesis {_VERSION} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run(
            [*pip, "--disable-pip-version-check", f"schemathesis=={_VERSION}"], check=True
        )
    return program


if __name__ == "__main__":
    sys.exit(main())
