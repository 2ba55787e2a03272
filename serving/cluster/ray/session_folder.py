"""The private folder of a Ray session: where it is, and what of it is left at the end.

Our sockets and tokens lie in it, and a folder for Ray's own files with the logs, which outlive a
session that was cut short.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

_MAX_PATH_CHARS = 107  # of a Unix socket, by the kernel
_LONGEST_NAME = "/hocket-12345678/ray/s1234/sockets/plasma_store"


def make_folder() -> Path:
    """Make a folder that nobody else may enter. Raises OSError."""
    parent = tempfile.gettempdir()
    if len(parent) + len(_LONGEST_NAME) > _MAX_PATH_CHARS:
        parent = "/tmp"  # noqa: S108 (the folder in it is made with a random name, for us alone)
    folder = Path(tempfile.mkdtemp(prefix="hocket-", dir=parent))
    ray_folder(folder).mkdir()
    return folder


def ray_folder(folder: Path) -> Path:
    """Return where Ray's files are, in a folder for each of its sessions."""
    return folder / "ray"


def messages_file(folder: Path) -> Path:
    """Return the file for what Ray would say on a terminal; it counts as a log."""
    return ray_folder(folder) / "messages.log"


def clear(folder: Path) -> None:
    """Remove all but the logs."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry != ray_folder(folder):
                _remove(entry)
        for entry in ray_folder(folder).iterdir():
            if entry.is_symlink():
                _remove(entry)
            elif entry.is_dir():
                for inner in entry.iterdir():
                    if inner.name != "logs":
                        _remove(inner)


def remove(folder: Path) -> None:
    """Remove the whole folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
