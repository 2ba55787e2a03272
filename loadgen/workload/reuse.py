"""How much of its prompts a trace with named blocks repeats: what a prefix cache can hit.

These are references to hold a server's own hit rate against; nothing here knows of a server. Each
request is looked up when the one before is in the cache, so they compare with a server that is
not asked for a prefix while it still computes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.workload.traces import Trace, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Hits count from the start of a prompt to the first block that is not cached."""

    num_blocks: int
    num_hit_blocks: int
    num_tokens: int
    num_hit_tokens: int

    @property
    def block_ratio(self) -> float:
        """Share of the blocks that hit, those not full among them: what traces publish."""
        return self.num_hit_blocks / self.num_blocks

    @property
    def token_ratio(self) -> float:
        """Share of the prompt tokens that hit: what servers report."""
        return self.num_hit_tokens / self.num_tokens


def num_distinct_tokens(trace: Trace) -> int:
    """Return the tokens of all blocks that differ, each counted as full."""
    return trace.block_tokens * len({it for request in trace.requests for it in request.block_ids})


def unbounded_reuse(requests: Sequence[TraceRequest], block_tokens: int) -> Reuse:
    """Return what a cache hits that never forgets."""
    return lru_reuse(requests, block_tokens, sum(len(it.block_ids) for it in requests))


def lru_reuse(requests: Sequence[TraceRequest], block_tokens: int, num_cached: int) -> Reuse:
    """Return what a cache of `num_cached` blocks hits that forgets the least recently used.

    Of one request the last block is forgotten first, as the others are of no use without those
    before them.
    """
    cache: OrderedDict[int, None] = OrderedDict()  # the next to forget first
    hit_blocks = hit_tokens = 0
    for request in requests:
        num_hits = _num_leading(request.block_ids, cache)
        hit_blocks += num_hits
        hit_tokens += min(num_hits * block_tokens, request.num_prompt_tokens)
        for block_id in reversed(request.block_ids):
            cache[block_id] = None
            cache.move_to_end(block_id)
        while len(cache) > num_cached:
            cache.popitem(last=False)
    return Reuse(
        num_blocks=sum(len(it.block_ids) for it in requests),
        num_hit_blocks=hit_blocks,
        num_tokens=sum(it.num_prompt_tokens for it in requests),
        num_hit_tokens=hit_tokens,
    )


def _num_leading(block_ids: tuple[int, ...], cache: OrderedDict[int, None]) -> int:
    for place, block_id in enumerate(block_ids):
        if block_id not in cache:
            return place
    return len(block_ids)
