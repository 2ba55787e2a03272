"""Types of flags that mean exactly what was typed.

Cyclopts rounds 1.5 where a whole number is wanted; these refuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    value = tokens[0].value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{value!r:.60} is not a whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
WholeOrNone = Annotated[int | None, Parameter(converter=_whole)]
