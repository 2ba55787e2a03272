"""Sessions: how large their turns are, how long a user thinks between them, what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from loadgen.types import LoadError, Session, Turn
from loadgen.workload.arrivals import MOST
from loadgen.workload.lengths import Lengths, fit_context
from loadgen.workload.tenants import Tenant
from loadgen.workload.text import Counted

Stream = Callable[[str], np.random.Generator]  # the randomness of one aspect, by its name


class TurnSize(NamedTuple):
    num_prompt_tokens: int  # of what the user says; of a first turn without a shared prefix
    max_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Think:
    """The pause before each turn but the first, in seconds."""

    mean_s: float
    is_exponential: bool = False

    def sample(self, rng: np.random.Generator, num: int) -> list[float]:
        if not self.is_exponential:
            return [self.mean_s] * num
        drawn: list[float] = rng.exponential(self.mean_s, num).tolist()
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What sessions are drawn from."""

    prompt: Lengths
    output: Lengths
    turns: Lengths
    next_prompt: Lengths  # of each turn after the first
    think: Think

    def sample(self, num: int, stream: Stream) -> list[list[TurnSize]]:
        """Draw the turns of `num` sessions.

        Every aspect has its own randomness: a change of one leaves the others as they were.
        """
        counts = self.turns.sample(stream("turns"), num).tolist()
        if sum(counts) > MOST:
            raise LoadError(
                f"the run would hold more than {MOST:,} requests", "ask for fewer turns"
            )
        num_later = sum(counts) - num
        firsts = self.prompt.sample(stream("prompts"), num).tolist()
        laters = iter(self.next_prompt.sample(stream("next prompts"), num_later).tolist())
        outputs = iter(self.output.sample(stream("outputs"), num + num_later).tolist())
        pauses = iter(self.think.sample(stream("think"), num_later))
        return [
            [
                TurnSize(first, next(outputs)),
                *(TurnSize(next(laters), next(outputs), next(pauses)) for _ in range(count - 1)),
            ]
            for first, count in zip(firsts, counts, strict=True)
        ]


def fit_turns(
    sizes: list[list[TurnSize]], max_context: int | None, num_shared: int
) -> tuple[list[list[TurnSize]], int]:
    """Shorten turns to the context; return them, and how many it was.

    A first turn has `num_shared` tokens more in front. The earlier turns that a later one carries
    are not counted: nobody knows yet how long the answers are.
    """
    fitted = [
        [_fitted(size, max_context, 0 if turn else num_shared) for turn, size in enumerate(turns)]
        for turns in sizes
    ]
    pairs = zip(chain(*sizes), chain(*fitted), strict=True)
    return fitted, sum(before != after for before, after in pairs)


def _fitted(size: TurnSize, max_context: int | None, num_shared: int) -> TurnSize:
    room = None if max_context is None else max_context - num_shared
    num_prompt, max_tokens = fit_context(size.num_prompt_tokens, size.max_tokens, room)
    return size._replace(num_prompt_tokens=num_prompt, max_tokens=max_tokens)


def write_sessions(
    starts_s: Sequence[float],
    tenants: Sequence[Tenant],
    sizes: Sequence[Sequence[TurnSize]],
    prompt: Callable[[int, int, int], Counted],  # of a session, a turn, so many own tokens
) -> list[Session]:
    """Put times, tenants, sizes and words together, one session after the other."""
    sessions = []
    for number, (start_s, tenant, turns) in enumerate(zip(starts_s, tenants, sizes, strict=True)):
        written = []
        for place, size in enumerate(turns):
            words, num_tokens = prompt(number, place, size.num_prompt_tokens)
            written.append(
                Turn(
                    prompt=words,
                    num_prompt_tokens=num_tokens,
                    max_tokens=size.max_tokens,
                    think_s=size.think_s,
                )
            )
        sessions.append(
            Session(
                start_at_s=start_s,
                turns=tuple(written),
                tenant=tenant.name,
                priority=tenant.priority,
            )
        )
    return sessions


def parse_think(spec: str) -> Think:
    """Read `2.5` (always 2.5 s) or `exp:2.5` (exponential, of that mean). Raises LoadError."""
    kind, _, mean = spec.strip().rpartition(":")
    try:
        mean_s = float(mean)
    except ValueError:
        mean_s = math.nan
    if kind not in {"", "exp"} or not 0 <= mean_s < math.inf:
        raise LoadError(f"{spec!r} is not a think time", "write seconds, as 2.5 or exp:2.5")
    return Think(mean_s, kind == "exp")
