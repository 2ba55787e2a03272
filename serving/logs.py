"""How the server logs: one event is one line, with fields, and never a prompt, an output or a key.

Everything goes through the standard library's loggers to stderr, uvicorn's messages too, in one of
two forms: words, or JSON with --log-json. Whatever comes from outside is stripped of what could end
a line or speak to a terminal. Of an exception the types and the places are shown; its message may
quote a request, so that is shown only at level debug.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Level = Literal["debug", "info", "warning"]
_FIELDS = "hocket_fields"  # attribute of a LogRecord
_MAX_CHARS = 2000  # of one message or field
_MAX_FRAMES = 20


def event(logger: logging.Logger, level: int, message: str, **fields: object) -> None:
    """Log one event. `message` is words of ours; what varies is in the fields.

    A field that is None is left out.
    """
    if logger.isEnabledFor(level):
        known = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, message, extra={_FIELDS: known})


def failure(logger: logging.Logger, message: str, error: BaseException, **fields: object) -> None:
    """Log an event that is somebody's fault, with what was raised and where."""
    logger.error(message, exc_info=error, extra={_FIELDS: fields})


def configure(*, as_json: bool, level: Level, stream: TextIO | None = None) -> None:
    """Send the log of this process to `stream` (stderr), and to nowhere else."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    shows_messages = level == "debug"
    handler.setFormatter(JsonLines(shows_messages) if as_json else TextLines(shows_messages))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _LOUD:  # what they say at debug is of their own insides, some of it of requests
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))


_LOUD = ("asyncio", "uvicorn", "multipart", "python_multipart")


def printable(text: str) -> str:
    """Return the text as one harmless line, cut if it is long: `\\n`, `\\x1b` for what is not."""
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS] + "..."
    if text.isprintable():
        return text
    # Each by itself: one bad character must not make escapes of all that is not ASCII.
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class TextLines(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO    words name=value ...`; frames follow, indented."""

    def __init__(self, shows_messages: bool = False) -> None:  # noqa: FBT001, FBT002
        super().__init__()
        self._shows_messages = shows_messages

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), f"{record.levelname:<7}", printable(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in _fields(record).items()]
        lines = [" ".join(words), *_failure(record, shows_messages=self._shows_messages)]
        return "\n    ".join(lines)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields."""

    def __init__(self, shows_messages: bool = False) -> None:  # noqa: FBT001, FBT002
        super().__init__()
        self._shows_messages = shows_messages

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
        }
        for name, value in _fields(record).items():
            document[name] = value if isinstance(value, int | float) else printable(str(value))
        failure = _failure(record, shows_messages=self._shows_messages)
        if failure:
            document["error"], document["frames"] = failure[0], failure[1:]
        return json.dumps(document, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    return fields


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' ="') else text


def _failure(record: logging.LogRecord, *, shows_messages: bool) -> list[str]:
    """Return what was raised, then where, innermost last; nothing if nothing was."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return []
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    words, cause = [_named(error, shows_messages)], error.__cause__ or error.__context__
    while cause is not None and len(words) < _MAX_FRAMES:
        words.append(_named(cause, shows_messages))
        cause = cause.__cause__ or cause.__context__
    places = [printable(f"{frame.filename}:{frame.lineno} {frame.name}") for frame in frames]
    return [" from ".join(words), *places]


def _named(error: BaseException, shows_message: bool) -> str:  # noqa: FBT001
    return type(error).__name__ + (f": {printable(str(error))}" if shows_message else "")
