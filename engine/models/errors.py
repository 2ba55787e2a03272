"""What a model file, or a machine, that cannot be used raises. Never catches or prints it."""

from __future__ import annotations


class ModelFormatError(Exception):
    """A model's files are of a kind, or in a state, that Hocket does not read.

    `cause` is one line: what was found and what is supported. `remedy` is one line: what the user
    can do about it. Both are shown to the user as they are.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        # Both go to args, so that the error survives pickling between processes.
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return self.cause


class NotReproducible(Exception):
    """This machine's kernels cannot keep the promise of the batch-invariant mode.

    `cause` and `remedy` are a line each, shown to the user as they are.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return self.cause
