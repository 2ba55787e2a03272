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
# tokens that need not be computed there, up to this share of those that it may run.
TOKENS_PER_REQUEST = 128
LEAD_SHARE = 8


class PrefixAffinity:
    """Remembers where chunks of prompts were sent, the latest longest."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        # By incarnation, so that one that is gone need not be looked for everywhere.
        self._places: OrderedDict[int, dict[int, None]] = OrderedDict()
        self._incarnations: dict[InstanceId, int] = {}
        self._ids: dict[int, InstanceId] = {}
        self._num_incarnations = 0

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
        missing = set(self._ids)  # places may name some that are gone
        nowhere: dict[int, None] = {}
        for depth in range(len(keys), 0, -1):  # who has a prompt up to here has all before
            if not missing:
                break
            for incarnation in sorted(self._places.get(keys[depth - 1], nowhere).keys() & missing):
                missing.remove(incarnation)
                found[self._ids[incarnation]] = depth * CHUNK_TOKENS
        return found

    def sent(self, keys: Sequence[int], instance_id: InstanceId) -> None:
        """The prompt with these keys was sent there."""
        incarnation = self._incarnations.get(instance_id)
        if incarnation is None:
            incarnation = self._incarnations[instance_id] = self._num_incarnations
            self._ids[incarnation] = instance_id
            self._num_incarnations += 1
        for key in keys:
            places = self._places.setdefault(key, {})
            places[incarnation] = None
            if len(places) > len(self._ids):
                self._places[key] = {place: None for place in places if place in self._ids}
        for key in reversed(keys):  # the beginning of a prompt is kept longest
            self._places.move_to_end(key)
        while len(self._places) > self._max_keys:
            self._places.popitem(last=False)

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone, and all that it had computed."""
        incarnation = self._incarnations.pop(instance_id, None)
        if incarnation is not None:
            del self._ids[incarnation]


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
        worth = min(num_tokens // TOKENS_PER_REQUEST, load.max_num_running // LEAD_SHARE)
        if not num_tokens or num_tokens < most or load.num_requests - least > 1 + worth:
            continue
        if num_tokens > most:
            best, most = [], num_tokens
        best.append(load)
    return best or loads
