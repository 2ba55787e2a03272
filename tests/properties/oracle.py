"""What the checksum executor says to a request that runs alone, in plain integers and a few lines.

No scheduler, no blocks, no arrays: a sum over the tokens in order. The law compares with it, as it
is many times quicker than running each request alone; a test compares it with doing that.
"""

from __future__ import annotations

import zlib

from engine.batch import _asks_for_rules
from scheduler.types import FinishReason, RequestSpec
from tests.factories import VOCAB_SIZE

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def tokens_alone(spec: RequestSpec) -> tuple[list[int], FinishReason]:
    """Return the output of a request and why it ends."""
    params = spec.params
    key = _mix(_mix(params.seed) + params.choice) if params.temperature > 0 else 0
    settings = zlib.crc32(repr(params).encode())
    read = history = num_tokens = 0
    output: list[int] = []
    new = list(spec.prompt_token_ids)
    while True:
        for token in new:
            read += _mix(token + _mix(num_tokens)) * (2 * num_tokens + 1)
            history += _mix(token) * (2 * num_tokens + 1)
            num_tokens += 1
        digest = read + key
        if _asks_for_rules(params):
            digest += _mix((history + len(spec.prompt_token_ids)) & _MASK) + settings
        new = [_mix(digest & _MASK) % VOCAB_SIZE]
        output += new
        if new[0] in params.stop_token_ids and len(output) > params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens:
            return output, FinishReason.LENGTH
