"""A profile: how long the steps of a model take on a machine, as `hocket profile` writes it.

Plain data, light to import; `engine.step_times` measures and fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scheduler.costs import StepCosts, StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of step: some decode behind `context` tokens, one computes a chunk behind its own."""

    num_decodes: int = 0
    context: int = 0
    chunk: int = 0
    behind: int = 0

    @property
    def num_rows(self) -> int:
        return self.num_decodes + bool(self.chunk)

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.chunk

    @property
    def num_row_tokens(self) -> int:
        """Tokens that a row has room for."""
        return max(self.context + 1 if self.num_decodes else 0, self.behind + self.chunk)

    @property
    def shape(self) -> StepShape:
        shape = StepShape()
        for _ in range(self.num_decodes):
            shape = shape.with_request(self.context).with_tokens(self.context, 1)
        if self.chunk:
            shape = shape.with_request(self.behind).with_tokens(self.behind, self.chunk)
        return shape

    def __str__(self) -> str:
        decodes = f"{self.num_decodes} decode behind {self.context}"
        chunk = f"chunk of {self.chunk} behind {self.behind}"
        return ", ".join([decodes] * bool(self.num_decodes) + [chunk] * bool(self.chunk))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A cell of a profile, with the error of the costs that were fitted."""

    case: Case
    median_s: float
    error: float
    is_fitted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class What:
    """What a profile is of: another has other costs."""

    model: str  # the name of its folder
    dtype: str
    kernels: str
    num_threads: int

    def difference(self, other: What) -> str | None:
        """Return in words the first thing that is not the same, None if all is."""
        for name, words in (
            ("model", "model"), ("dtype", "dtype"), ("kernels", "kernels"),
            ("num_threads", "threads"),
        ):  # fmt: skip
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{words} {mine}, not {its}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What `hocket profile` writes: costs, what they are of, and what they were made of."""

    what: What
    costs: StepCosts
    cells: tuple[Measured, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Raises OSError, and ValueError for a file that is none."""
        import msgspec

        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """Raises OSError."""
        import msgspec

        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
