"""What a request shares with others: its keys, what it finds computed, what it makes findable.

Of several requests with the same prefix only the first computes it: the others wait until the
blocks that they lack are published, and proceed together.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.config import InstanceConfig
from scheduler.kv.manager import Hit, KVManager
from scheduler.kv.prefix import Key, next_key, next_keys, root_key
from scheduler.request import Request


class RequestPrefixes:
    """Between requests and the prefix index of their KV memory."""

    def __init__(self, kv: KVManager, config: InstanceConfig) -> None:
        self._kv = kv
        self._enabled = config.prefix_caching
        self._model_revision = config.model_revision
        self._block_size = kv.geometry.block_size
        self._computing: dict[Key, Request] = {}  # blocks of prompts, by who will publish them

    @property
    def num_computing(self) -> int:
        return len(self._computing)

    def is_coming(self, request: Request) -> bool:
        """Whether the request waits for a prefix that another one computes."""
        if request.waits_for is not None and request.waits_for not in self._computing:
            request.waits_for = None
        return request.waits_for is not None

    def num_deferred(self, waiting: Sequence[Request]) -> int:
        """Return how many of them wait for a prefix that another one computes."""
        computing = self._computing
        if not computing:
            return 0
        return sum(
            request.waits_for is not None and request.waits_for in computing for request in waiting
        )

    def find(self, request: Request) -> Hit | None:
        """Return what the request finds computed; None if it shall wait for more to be.

        A request that wants logprobs of its prompt computes all of it.
        """
        if not self._enabled or request.spec.params.prompt_logprobs is not None:
            return Hit()
        num_tokens = request.num_tokens
        keys = self._keys(request, num_tokens // self._block_size)
        tail = self._tail(request) if not request.output_token_ids else None
        hit = self._kv.find(keys, tail, num_tokens)
        num_found = len(hit.blocks)
        if num_found < len(keys) and hit.partial is None:
            leader = self._computing.get(keys[num_found])
            if leader is not None and leader.rank <= request.rank:
                request.waits_for = keys[num_found]
                return None
        return hit

    def begin(self, request: Request, num_found_blocks: int) -> None:
        """The request computes what it did not find."""
        request.num_published_blocks = num_found_blocks
        for key in request.block_keys[num_found_blocks:]:
            self._computing.setdefault(key, request)

    def publish(self, request: Request, num_computed_tokens: int) -> None:
        """Let others find the request's full blocks up to here, and its prompt's last one."""
        num_full_blocks = num_computed_tokens // self._block_size
        if not self._enabled:
            return
        if request.num_published_blocks < num_full_blocks:
            keys = self._keys(request, num_full_blocks)
            for index in range(request.num_published_blocks, num_full_blocks):
                self._kv.publish(request.request_id, index, keys[index])
                self._finished(keys[index], request)
            request.num_published_blocks = num_full_blocks
        if num_computed_tokens == len(request.spec.prompt_token_ids):
            tail = self._tail(request)
            if tail is not None:
                self._kv.publish(request.request_id, num_full_blocks, tail)

    def forget_beyond(self, request: Request, num_output_tokens: int) -> None:
        """Let nobody find what the request computed beyond so many output tokens."""
        num_tokens = len(request.spec.prompt_token_ids) + num_output_tokens
        self._kv.unpublish(request.block_keys[num_tokens // self._block_size :])

    def end(self, request: Request) -> None:
        """The request computes no more: those who wait for it go on without."""
        request.waits_for = None
        for key in request.block_keys[request.num_published_blocks :]:
            self._finished(key, request)

    def _finished(self, key: Key, request: Request) -> None:
        if self._computing.get(key) is request:
            del self._computing[key]

    def _keys(self, request: Request, num_blocks: int) -> list[Key]:
        """Return the keys of the first full blocks; each is computed once."""
        keys = request.block_keys
        if len(keys) < num_blocks:
            size = self._block_size
            parent = keys[-1] if keys else self._root(request)
            behind = request.tokens_between(len(keys) * size, num_blocks * size)
            keys += next_keys(parent, behind, size)
        return keys[:num_blocks] if len(keys) > num_blocks else keys

    def _tail(self, request: Request) -> Key | None:
        """Return the key of the prompt's tokens behind its last full block, if there are any."""
        prompt = request.spec.prompt_token_ids
        num_full_blocks = len(prompt) // self._block_size
        tail = prompt[num_full_blocks * self._block_size :]
        if tail and request.tail_key is None:
            keys = self._keys(request, num_full_blocks)
            request.tail_key = next_key(keys[-1] if keys else self._root(request), tail)
        return request.tail_key

    def _root(self, request: Request) -> Key:
        return root_key(self._model_revision, request.spec.tenant, request.spec.cache_salt)
