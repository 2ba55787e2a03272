"""Where results go: names are checked before a run, and one that fails costs no other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from loadgen.types import LoadError


def check_outputs(*paths: Path | None) -> None:
    """Raise LoadError for a file that could not be written after an hour's run."""
    given = [path for path in paths if path is not None]
    for path in given:
        if not path.name or path.is_dir():
            raise LoadError(f"{str(path)!r} is not the name of a file", "name a file, not a folder")
        if not path.parent.is_dir():
            raise LoadError(f"there is no folder {path.parent}", "make it, or name another")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise LoadError(f"{path} may not be written", "name a file that may be")
    if len({path.resolve() for path in given}) < len(given):
        raise LoadError(f"{given[0]} is named twice", "give each result a file of its own")


def write_all(*writers: Callable[[], None]) -> None:
    """Call every one of them; then raise the first LoadError that came."""
    errors = []
    for write in writers:
        try:
            write()
        except LoadError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def to_stdout(show: Callable[[], None]) -> Callable[[], None]:
    """Return a writer for `write_all` that bears a terminal which is gone, or knows few letters."""

    def write() -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        try:
            show()
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # nobody reads on (rich then wants to leave)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return write
