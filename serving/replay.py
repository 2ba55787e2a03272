"""`hocket replay`: tells how the decisions of a log compare with those made again from it."""

from __future__ import annotations

from pathlib import Path

from engine.decision_log import replay
from serving.errors import UserError

_MAX_SHOWN = 5
_MAX_CHARS = 300


def report(path: Path) -> bool:
    """Print the differences and a count. True if there are none. Raises UserError."""
    num_decisions = num_differences = 0
    try:
        for difference in replay(path):
            num_decisions += 1
            if difference is None:
                continue
            num_differences += 1
            if num_differences <= _MAX_SHOWN:
                recorded, replayed = (
                    answer.decode()[:_MAX_CHARS]
                    for answer in (difference.recorded, difference.replayed)
                )
                _say(f"line {difference.line}, {difference.asked}")
                _say(f"  recorded {recorded}\n  replayed {replayed}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be replayed: {error}",
            "name a file that `hocket serve --decision-log FILE` wrote with this version",
        ) from error
    _say(f"{num_decisions:,} decisions, {num_differences:,} differences")
    return not num_differences


def _say(text: str) -> None:
    print(text)  # noqa: T201 (the command's result)
