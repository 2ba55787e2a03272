"""How much of the prompts fits into a step, so that those who decode wait no longer than promised.

The promise: while requests decode, a step takes at most `max_step_s` by its costs, unless one
token for each request that runs, and `min_prompt_tokens` beside them, take longer. So streams are
steady, and prompts always go on. When nothing decodes, nobody waits for the step, and the token
budget is the only bound.
"""

from __future__ import annotations

from bisect import bisect_right

from scheduler.costs import StepCosts, StepShape

# The weight of one step in the pace. It rises four times as fast as it falls, so that it is not the
# mean step that takes as long as the limit, but a slow one.
_RISE, _FALL = 1 / 8, 1 / 32
_MAX_PACE = 2.0


def num_fitting(
    costs: StepCosts, shape: StepShape, num_computed: int, most: int, limit_s: float
) -> int:
    """Return how many tokens of a request of `shape` fit as well, at most `most`, maybe none."""

    def with_tokens_s(num_tokens: int) -> float:
        return costs.step_s(shape.with_tokens(num_computed, num_tokens))

    return bisect_right(range(1, most + 1), limit_s, key=with_tokens_s)


class StepBudget:
    """What is left of one step's time. Begins with a token for each request that runs."""

    __slots__ = ("_costs", "_limit_s", "_num_sure", "shape")

    def __init__(self, costs: StepCosts, shape: StepShape, limit_s: float, num_sure: int) -> None:
        self.shape = shape
        self._costs = costs
        self._limit_s = limit_s
        self._num_sure = num_sure

    @property
    def step_s(self) -> float:
        return self._costs.step_s(self.shape)

    def has_room(self, num_computed: int) -> bool:
        """Whether a request that is not in the step could compute a token in it."""
        shape = self.shape.with_request(num_computed)
        fits = num_fitting(self._costs, shape, num_computed, 1, self._limit_s)
        return self._num_sure > 0 or fits == 1

    def enter(self, num_computed: int) -> None:
        """Count in a request, none of whose tokens the step computes yet."""
        self.shape = self.shape.with_request(num_computed)

    def room(self, num_computed: int, most: int) -> int:
        """Return how many more tokens a request that is in the step may compute."""
        fitting = num_fitting(self._costs, self.shape, num_computed, most, self._limit_s)
        return max(fitting, min(most, self._num_sure))

    def take(self, num_computed: int, num_tokens: int) -> None:
        """Count them in."""
        self._num_sure = max(0, self._num_sure - num_tokens)
        self.shape = self.shape.with_tokens(num_computed, num_tokens)


class Pace:
    """How much slower steps are than their costs say: smoothed, and bounded.

    Costs are measured in a moment, on a machine that others may use too.
    """

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def took(self, predicted_s: float, duration_s: float) -> None:
        if predicted_s > 0.0 and duration_s > 0.0:
            ratio = min(max(duration_s / predicted_s, 1 / _MAX_PACE), _MAX_PACE)
            self.factor += (ratio - self.factor) * (_RISE if ratio > self.factor else _FALL)
