"""What may be shown: texts that others wrote, addresses and commands without their secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_MASK = "***"
_NAMES = r"[\w-]*(?:key|token|secret|password|auth[\w-]*|header)"
_SECRET = re.compile(rf"(?i)--?{_NAMES}")  # a flag whose next word is not shown
_GIVEN = re.compile(rf"(?i)(?:--?)?{_NAMES}(?==)")
_WITHIN = re.compile(rf"(?i)(?:--?{_NAMES}\s|{_NAMES}=)")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")


def plain(text: str, limit: int = 60) -> str:
    """Take what could steer a terminal out of a text, and shorten it to `limit` characters."""
    shown = "".join(char if char.isprintable() else " " for char in text).strip()
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def without_user(text: str) -> str:
    """Return an address, or a text with addresses in it, without names and passwords."""
    return _USER.sub("", text)


def command_line(command: Sequence[str]) -> str:
    """Return what to type to do it again, but for keys and passwords."""
    if not command:
        return ""
    program = Path(command[0])
    is_module = program.name == "__main__.py"
    name = ["python", "-m", program.parent.name] if is_module else [program.name]
    return _joined([*name, *_masked(command[1:])])


def _masked(words: Sequence[str]) -> list[str]:
    shown: list[str] = []
    is_secret = False
    for word in words:
        if is_secret:
            shown.append(_MASK)
        elif given := _GIVEN.match(word):
            shown.append(f"{given[0]}={_MASK}")
        else:
            shown.append(without_user(_within(word)))
        is_secret = not is_secret and bool(_SECRET.fullmatch(word))
    return shown


def _joined(words: Sequence[str]) -> str:
    """Join as a shell splits; only the masks stand as they are, which nobody types."""
    return " ".join(
        word if word.endswith(_MASK) and " " not in word else shlex.quote(word) for word in words
    )


def _within(word: str) -> str:
    """Mask inside a word that is a command line itself, such as one in quotes."""
    if not _WITHIN.search(word):
        return word
    try:
        return _joined(_masked(shlex.split(word)))
    except ValueError:  # a quote that does not end
        return _MASK
