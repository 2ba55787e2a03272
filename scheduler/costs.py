"""What a step costs, as a model: the clock of the simulator and of the fake executor, and the
measure of what fits into a step."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import NamedTuple


class StepShape(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int = 0  # computed in this step
    num_requests: int = 0
    num_context_tokens: int = 0  # keys read: the sum over requests of their length after the step
    num_visits: int = 0  # the sum over the step's tokens of the keys that each sees

    def with_request(self, num_computed: int) -> StepShape:
        """Return the shape beside one more request, none of whose tokens it computes yet."""
        return self._replace(
            num_requests=self.num_requests + 1,
            num_context_tokens=self.num_context_tokens + num_computed,
        )

    def with_tokens(self, num_computed: int, num_tokens: int) -> StepShape:
        """Return the shape with more tokens of a request that is in it, behind its others."""
        return StepShape(
            self.num_tokens + num_tokens,
            self.num_requests,
            self.num_context_tokens + num_tokens,
            self.num_visits + num_visits(num_computed, num_tokens),
        )


def num_visits(num_computed: int, num_tokens: int) -> int:
    """Return the keys that a chunk's tokens see: those before it, each other's, their own."""
    return num_tokens * num_computed + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """A step's seconds: its dense layers by a table, the rest in proportion.

    `dense` are (tokens, seconds) as measured, by tokens. Between two it is a line, before the first
    constant, behind the last the last line goes on. Dense layers are bound by memory with few
    tokens and by arithmetic with many, which no single line fits. Beside them a request costs its
    sampling and bookkeeping, attention as many keys as it reads and as its tokens visit.

    More of anything never costs less. Raises ValueError for numbers that would not keep that.
    """

    dense: tuple[tuple[int, float], ...] = ((0, 0.0),)
    request_s: float = 0.0
    context_token_s: float = 0.0
    visit_s: float = 0.0

    def __post_init__(self) -> None:
        sizes = [num_tokens for num_tokens, _ in self.dense]
        seconds = [0.0, *(each_s for _, each_s in self.dense)]
        rates = (self.request_s, self.context_token_s, self.visit_s)
        if not (
            self.dense
            and all(one < other for one, other in pairwise(sizes))
            and all(one <= other for one, other in pairwise(seconds))
            and all(0.0 <= each_s < inf for each_s in (*seconds, *rates))
        ):
            raise ValueError("the costs of a step are not ascending, finite and 0 or more")

    @classmethod
    def linear(
        cls,
        *,
        fixed_s: float = 0.0,
        token_s: float = 0.0,
        request_s: float = 0.0,
        context_token_s: float = 0.0,
    ) -> StepCosts:
        """Return `fixed + tokens + requests + context`, each times its own cost."""
        return cls(
            dense=((0, fixed_s), (1, fixed_s + token_s)),
            request_s=request_s,
            context_token_s=context_token_s,
        )

    def step_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of this shape takes."""
        return (
            self._dense_s(shape.num_tokens)
            + self.request_s * shape.num_requests
            + self.context_token_s * shape.num_context_tokens
            + self.visit_s * shape.num_visits
        )

    def _dense_s(self, num_tokens: int) -> float:
        dense = self.dense
        if len(dense) == 1 or num_tokens <= dense[0][0]:
            return dense[0][1]
        index = min(bisect_left(dense, (num_tokens,)), len(dense) - 1)
        (low, low_s), (high, high_s) = dense[index - 1 : index + 1]
        return low_s + (num_tokens - low) * ((high_s - low_s) / (high - low))
