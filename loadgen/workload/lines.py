"""Reads text files line by line, plain or gzip, and says in one line what is wrong with them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from loadgen.types import LoadError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of every line that is not blank.

    A name that ends in .gz is unpacked. Raises LoadError for a file that is missing, damaged or
    not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LoadError(
            f"{path}, after line {number}: not UTF-8 text ({error.reason})",
            "give a text file; a packed one must end in .gz",
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LoadError(
            f"{path}, after line {number}: damaged gzip data ({error})", "fetch the file again"
        ) from error
    except OSError as error:
        raise LoadError(
            f"{path} cannot be read: {error.strerror or error}", "check the path"
        ) from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")
