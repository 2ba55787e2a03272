"""The private folder of a Ray session: where it is, and what of it is left at the end.

Sockets, tokens and Ray's own files lie in it, and the logs, which outlive a session that was cut
short.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

_MAX_PATH_CHARS = 107  # of a Unix socket, by the kernel
_LONGEST_NAME = "/hocket-12345678/s123/sockets/plasma_store"


def make_folder() -> Path:
    """Make a folder that nobody else may enter. Raises OSError."""
    parent = tempfile.gettempdir()
    if len(parent) + len(_LONGEST_NAME) > _MAX_PATH_CHARS:
        parent = "/tmp"  # noqa: S108 (the folder in it is made with a random name, for us alone)
    return Path(tempfile.mkdtemp(prefix="hocket-", dir=parent))


def clear(folder: Path) -> None:
    """Remove all but the logs of each session; the whole folder if there are none."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_symlink() or not (entry / "logs").is_dir():
                _remove(entry)
                continue
            for inner in entry.iterdir():
                if inner.name != "logs":
                    _remove(inner)
        folder.rmdir()


def remove(folder: Path) -> None:
    """Remove the whole folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
