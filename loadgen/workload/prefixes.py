"""Beginnings that requests share: a few long ones, or the blocks of a trace."""

from __future__ import annotations

import numpy as np

from loadgen.workload.text import Counted, Prompts
from loadgen.workload.traces import TraceRequest


class SharedPrefixes:
    """`num_prefixes` prefixes of `num_tokens` each; every prompt gets one of them, all alike."""

    def __init__(
        self, prompts: Prompts, num_prefixes: int, num_tokens: int, rng: np.random.Generator
    ) -> None:
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._prefixes = [prompts.make(num_tokens, rng) for _ in range(num_prefixes)]

    def make(self, num_own_tokens: int, rng: np.random.Generator) -> Counted:
        """Return a prefix and `num_own_tokens` more, counted together."""
        prefix = self._prefixes[int(rng.integers(len(self._prefixes)))]
        return self._prompts.make(self._num_tokens + num_own_tokens, rng, prefix)


def block_prompt(prompts: Prompts, request: TraceRequest, block_tokens: int, seed: int) -> Counted:
    """Return the prompt of a request whose blocks are named: the same name, the same tokens.

    A block's name stands for everything up to its end, as in a prefix cache, so it is always
    found behind the same blocks.
    """
    prompt = None
    for place, block_id in enumerate(request.block_ids):
        num_tokens = min((place + 1) * block_tokens, request.num_prompt_tokens)
        prompt = prompts.make(num_tokens, np.random.default_rng([seed, block_id]), prompt)
    assert prompt is not None, "a request of such a trace has a block at least"
    return prompt
