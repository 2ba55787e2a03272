"""Which instance has probably computed the beginning of a prompt: those it was dispatched to.

A guess, of bounded memory: instances may have evicted it. It narrows a choice and never makes it;
a prefix that is somewhere is worth so much more load there, and no more.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from scheduler.cluster.ledger import InstanceLoad
from scheduler.types import InstanceId, RequestSpec

CHUNK_TOKENS = 64  # what a prompt is cut into; a shorter common beginning is not worth a detour
MAX_CHUNKS = 128  # of a prompt; what lies behind follows its beginning
MAX_KEYS = 1 << 16
# An instance may have one request more than the least loaded one, and another one for so many
# tokens that need not be computed there.
TOKENS_PER_REQUEST = 128


class PrefixAffinity:
    """Remembers where chunks of prompts were sent, the latest longest."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._places: OrderedDict[int, dict[InstanceId, None]] = OrderedDict()

    def keys(self, spec: RequestSpec) -> list[int]:
        """Return a key for each full chunk of the prompt, made of all tokens up to there."""
        tokens = spec.prompt_token_ids
        key = zlib.crc32(f"{spec.tenant}\0{spec.cache_salt}".encode())
        keys = []
        num_chunks = min(len(tokens) // CHUNK_TOKENS, MAX_CHUNKS)
        for start in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS):
            # Hashes of integers are the same everywhere; equal ones by accident cost a detour.
            key = hash((key, tokens[start : start + CHUNK_TOKENS]))
            keys.append(key)
        return keys

    def found(self, keys: Sequence[int]) -> dict[InstanceId, int]:
        """Return how many tokens of the prompt each instance has probably computed."""
        found: dict[InstanceId, int] = {}
        for depth, key in enumerate(keys):
            places = self._places.get(key)
            here = [
                instance_id
                for instance_id in places or ()
                if found.get(instance_id, 0) == depth * CHUNK_TOKENS
            ]
            if not here:
                break
            for instance_id in here:
                found[instance_id] = (depth + 1) * CHUNK_TOKENS
        return found

    def sent(self, keys: Sequence[int], instance_id: InstanceId) -> None:
        """The prompt with these keys was sent there."""
        for key in keys:
            self._places.setdefault(key, {})[instance_id] = None
        for key in reversed(keys):  # the beginning of a prompt is kept longest
            self._places.move_to_end(key)
        while len(self._places) > self._max_keys:
            self._places.popitem(last=False)

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone, and all that it had computed."""
        for key in [key for key, places in self._places.items() if instance_id in places]:
            del self._places[key][instance_id]
            if not self._places[key]:
                del self._places[key]


def preferred(
    loads: Sequence[InstanceLoad], found: Mapping[InstanceId, int]
) -> Sequence[InstanceLoad]:
    """Return those that have the most of the prompt without being too much busier than the rest;
    all, if none has any of it.
    """
    if not found:
        return loads
    least = min(load.num_requests for load in loads)
    best: list[InstanceLoad] = []
    most = 0
    for load in loads:
        num_tokens = found.get(load.instance_id, 0)
        lead = load.num_requests - least
        if not num_tokens or num_tokens < most or lead > 1 + num_tokens // TOKENS_PER_REQUEST:
            continue
        if num_tokens > most:
            best, most = [], num_tokens
        best.append(load)
    return best or loads
