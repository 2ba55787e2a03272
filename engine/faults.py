"""What may be said of an exception that came while requests were computed. Torch-free.

Its message may quote a request: `detail_of` is for the log at level debug and for nobody else.
"""

from __future__ import annotations

import traceback

MAX_DETAIL_CHARS = 8000


def cause_of(error: BaseException, *, message: bool = False) -> str:
    """Return its class and where it was raised, in one line.

    With its message only where no request can be in it: before there are any.
    """
    what = f"{type(error).__name__}: {error}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(what.split()) + where


def detail_of(error: BaseException) -> str:
    """Return all of it: the traceback and the message, their end if they are long."""
    return "".join(traceback.format_exception(error))[-MAX_DETAIL_CHARS:]
