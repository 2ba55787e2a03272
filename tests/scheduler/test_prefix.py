"""Cached prefixes: the KV manager against a dict of what was published."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.kv.manager import Hit, KVManager
from scheduler.kv.prefix import next_key, root_key
from scheduler.types import RequestId
from tests.factories import make_geometry
from tests.properties.invariants import blocks_of

SIZE = 4
NUM_BLOCKS = 10
STEMS = ((1,) * 16, (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2), (3,) * 8)
SPACES = (("x", ""), ("x", "salt"), ("y", ""))  # tenant and salt: who may share
Space = tuple[str, str]
Tokens = tuple[int, ...]


@cache
def keys_of(space: Space, tokens: Tokens) -> tuple[list[bytes], bytes | None]:
    """Return the keys of the full blocks, and that of the tokens behind them."""
    keys: list[bytes] = []
    parent = root_key("", *space)
    for start in range(0, len(tokens), SIZE):
        parent = next_key(parent, tokens[start : start + SIZE])
        keys.append(parent)
    tail = keys.pop() if len(tokens) % SIZE else None
    return keys, tail


@dataclass
class Holder:
    space: Space
    tokens: Tokens
    num_prompt: int
    table: list[int]
    num_computed: int


class PrefixMachine(RuleBasedStateMachine):
    """The reference model: what was published leads to which block, and what was written there."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(make_geometry(NUM_BLOCKS, SIZE))
        self.holders: dict[str, Holder] = {}
        self.leases: dict[int, list[tuple[str, list[int]]]] = {}
        self.found: dict[tuple[Space, Tokens], int] = {}
        self.ever_found: dict[tuple[Space, Tokens], None] = {}  # also what is forgotten
        self.content: dict[int, tuple[Space, Tokens]] = {}  # all tokens up to the last in a block
        self.dirty: set[int] = set()
        self.to_clear: set[int] = set()
        self.step_id = 0  # the next to complete; the one after it is in flight too
        self.num_holders = 0

    # --- the model ---

    def refs(self) -> Counter[int]:
        refs = Counter(block for holder in self.holders.values() for block in holder.table)
        for entries in self.leases.values():
            refs.update(block for _, blocks in entries for block in blocks)
        return refs

    def idle(self) -> set[int]:
        return set(self.found.values()) - set(self.refs())

    def free(self) -> set[int]:
        return set(range(NUM_BLOCKS)) - set(self.refs()) - self.idle() - self.to_clear

    def forget(self, blocks) -> None:
        self.found = {path: block for path, block in self.found.items() if block not in blocks}

    def clear_what_is_dirty(self) -> None:
        gone = self.dirty - set(self.refs())
        self.dirty -= gone
        self.to_clear |= gone

    def expected(self, space: Space, tokens: Tokens, with_tail: bool) -> Hit:
        blocks: list[int] = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if (space, tokens[:end]) not in self.found:
                return Hit(tuple(blocks), None, len(blocks) * SIZE)
            blocks.append(self.found[space, tokens[:end]])
        partial = None
        if not len(tokens) % SIZE:
            partial = blocks.pop()
        elif with_tail:
            partial = self.found.get((space, tokens))
        num_shared = len(blocks) * SIZE
        if partial is None or num_shared == len(tokens) - 1:
            return Hit(tuple(blocks), None, num_shared)
        return Hit(tuple(blocks), partial, len(tokens) - 1)

    def look_up(self, space: Space, tokens: Tokens, with_tail: bool) -> Hit:
        keys, tail = keys_of(space, tokens)
        hit = self.kv.find(keys, tail if with_tail else None, len(tokens))
        assert hit == self.expected(space, tokens, with_tail)
        assert hit.num_tokens < len(tokens), "nothing is left to compute"
        for index, block in enumerate(hit.blocks):
            end = (index + 1) * SIZE
            assert self.content[block] == (space, tokens[:end])
        if hit.partial is not None:
            written_in, written = self.content[hit.partial]
            assert (written_in, written[: hit.num_tokens]) == (space, tokens[: hit.num_tokens])
        return hit

    def cover(self, name: str, num_tokens: int, max_num_tokens: int) -> list[int] | None:
        """Grow a table; return its new blocks. Prefixes are evicted for what is missing alone."""
        holder = self.holders[name]
        missing = max(0, -(-num_tokens // SIZE) - len(holder.table))
        free, idle = self.free(), self.idle()
        claimed = set(blocks_of(self.kv._pool.claims()))
        groups = self.kv.cover(RequestId(name), num_tokens, max_num_tokens)
        if missing > len(free) + len(idle):
            assert groups is None
            return None
        assert groups is not None
        blocks = blocks_of(groups)
        evicted = idle - set(blocks_of(self.kv.idle()))
        assert len(blocks) == missing
        assert free | evicted >= set(blocks), "a block was handed out that others hold or find"
        # Idle prefixes give way before what is claimed for others.
        assert evicted or missing <= len(free)
        assert not evicted or missing > len(free - claimed), "a prefix was evicted for nothing"
        self.forget(evicted)
        holder.table += blocks
        return blocks

    # --- the rules ---

    @rule(
        space=st.sampled_from((SPACES[0], *SPACES)),
        stem=st.sampled_from(STEMS),
        num_shared=st.sampled_from([12, 8, 6, 4, 1]),
        tail=st.lists(st.integers(1, 2), max_size=2),
        with_tail=st.booleans(),
        slack=st.integers(0, 9),
        progress=st.sampled_from(["published", "published", "computed", "none"]),
    )
    def start(self, space, stem, num_shared, tail, with_tail, slack, progress) -> None:
        tokens = (*stem[:num_shared], *tail)
        hit = self.look_up(space, tokens, with_tail)
        assert self.kv.num_idle_in(hit) == len(self.idle() & {*hit.blocks, hit.partial})
        for attempt in (hit, hit.without_copy(SIZE)):
            missing = -(-len(tokens) // SIZE) - len(attempt.blocks)
            if missing + self.kv.num_idle_in(attempt) <= self.kv.num_free_blocks:
                name = self.adopt(space, tokens, attempt, len(tokens) + slack)
                if progress != "none":
                    self.compute(name)
                if progress == "published":
                    self.publish(name)
                return

    def adopt(self, space: Space, tokens: Tokens, hit: Hit, max_num_tokens: int) -> str:
        name = f"r{self.num_holders}"
        self.num_holders += 1
        self.kv.adopt(RequestId(name), hit, self.step_id + 1)
        self.holders[name] = Holder(space, tokens, len(tokens), [*hit.blocks], hit.num_tokens)
        if hit.partial is not None:
            self.leases.setdefault(self.step_id + 1, []).append((name, [hit.partial]))
        new = self.cover(name, len(tokens), max_num_tokens)
        assert new is not None, "it was said to fit"
        if hit.partial is not None:
            self.content[new[0]] = (space, tokens[: hit.num_tokens])
        return name

    def pick(self, index: int) -> str:
        return list(self.holders)[index % len(self.holders)]

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9))
    def go_on(self, index: int) -> None:
        name = self.pick(index)
        self.compute(name)
        self.publish(name)

    def compute(self, name: str) -> None:
        holder = self.holders[name]
        tables = Counter(block for other in self.holders.values() for block in other.table)
        for position in range(holder.num_computed, len(holder.tokens)):
            block = holder.table[position // SIZE]
            assert tables[block] == 1, "a block is written that another one reads"
            if position % SIZE:
                before = (holder.space, holder.tokens[:position])
                assert self.content[block] == before, "what comes before it is not there"
            self.content[block] = (holder.space, holder.tokens[: position + 1])
        holder.num_computed = len(holder.tokens)

    def publish(self, name: str) -> None:
        holder = self.holders[name]
        ends = list(range(SIZE, holder.num_computed + 1, SIZE))
        if holder.num_prompt % SIZE and holder.num_prompt <= holder.num_computed:
            ends.append(holder.num_prompt)
        for end in ends:
            keys, tail = keys_of(holder.space, holder.tokens[:end])
            at = (end - 1) // SIZE
            self.kv.publish(RequestId(name), at, tail or keys[-1])
            if holder.table[at] not in self.dirty:
                self.ever_found[holder.space, holder.tokens[:end]] = None
                self.found.setdefault((holder.space, holder.tokens[:end]), holder.table[at])

    @precondition(lambda self: self.holders)
    @rule(
        index=st.integers(0, 9),
        tail=st.lists(st.integers(1, 2), min_size=1, max_size=6),
        is_published=st.booleans(),
    )
    def grow(self, index: int, tail: list[int], is_published: bool) -> None:
        name = self.pick(index)
        holder = self.holders[name]
        if self.cover(name, len(holder.tokens) + len(tail), 99) is not None:
            holder.tokens += tuple(tail)
            if is_published:
                self.compute(name)
                self.publish(name)

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9), from_index=st.integers(0, 3))
    def unpublish(self, index: int, from_index: int) -> None:
        holder = self.holders[self.pick(index)]
        keys, _ = keys_of(holder.space, holder.tokens)
        self.kv.unpublish(keys[from_index:])
        for end in range((from_index + 1) * SIZE, len(holder.tokens) + 1, SIZE):
            self.found.pop((holder.space, holder.tokens[:end]), None)

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9), steps=st.sampled_from([None, None, 0, 1]))
    def end(self, index: int, steps: int | None) -> None:
        self.let_go(self.pick(index), steps)

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9), steps=st.sampled_from([None, 1]))
    def fail(self, index: int, steps: int | None) -> None:
        self.taint(self.pick(index))
        self.let_go(self.pick(index), steps)

    def let_go(self, name: str, steps: int | None) -> None:
        holder = self.holders.pop(name)
        if steps is None:
            self.kv.release(RequestId(name))
        else:
            self.kv.retire(RequestId(name), self.step_id + steps)
            self.leases.setdefault(self.step_id + steps, []).append((name, holder.table))
        self.clear_what_is_dirty()

    @precondition(lambda self: self.leases)
    @rule()
    def fail_what_is_retired(self) -> None:
        name = next(iter(self.leases.values()))[0][0]
        if name not in self.holders:
            self.taint(name)

    def taint(self, name: str) -> None:
        self.kv.taint(RequestId(name))
        entries = (entry for entries in self.leases.values() for entry in entries)
        blocks = {block for owner, held in entries if owner == name for block in held}
        if name in self.holders:
            blocks.update(self.holders[name].table)
        self.forget(blocks)
        self.dirty |= blocks

    @precondition(lambda self: self.to_clear)
    @rule()
    def take_clears(self) -> None:
        assert set(blocks_of(self.kv.take_clears())) == self.to_clear
        self.to_clear.clear()

    @precondition(lambda self: self.leases)
    @rule()
    def step_completed(self) -> None:
        self.kv.step_completed(self.step_id)
        self.leases.pop(self.step_id, None)
        self.step_id += 1
        self.clear_what_is_dirty()

    # --- what always holds ---

    @invariant()
    def every_block_is_where_the_model_has_it(self) -> None:
        refs = self.refs()
        assert self.kv._refs == [refs[block] for block in range(NUM_BLOCKS)]
        tables = {name: blocks_of(groups) for name, groups in self.kv.tables().items()}
        assert tables == {name: holder.table for name, holder in self.holders.items()}
        assert set(blocks_of(self.kv.idle())) == self.idle()
        assert set(blocks_of(self.kv.to_clear())) == self.to_clear
        assert set(blocks_of(self.kv.free_runs())) == self.free()
        assert self.kv.num_free_blocks == len(self.free()) + len(self.idle())
        retired = Counter(
            block for entries in self.leases.values() for _, held in entries for block in held
        )
        assert self.kv.num_retired_blocks == sum(refs[block] == 1 for block in retired)
        for name, holder in self.holders.items():
            num_own = sum(refs[block] == 1 for block in holder.table)
            assert self.kv.num_blocks_gained(RequestId(name), Hit()) == num_own
            hit = Hit(tuple(holder.table[:1]), next(iter(holder.table[1:2]), None))
            num_found = sum(refs[block] == 1 for block in holder.table[:2])
            assert self.kv.num_blocks_gained(RequestId(name), hit) == num_own - num_found

    @invariant()
    def exactly_what_was_published_is_found(self) -> None:
        for space, tokens in self.ever_found:
            for asking in SPACES:
                self.look_up(asking, (*tokens, 9), with_tail=False)
            self.look_up(space, tokens, with_tail=True)

    def teardown(self) -> None:
        while self.holders:
            self.let_go(self.pick(0), None)
        self.step_completed()
        self.step_completed()
        self.kv.check_idle()


TestPrefixes = PrefixMachine.TestCase
TestPrefixes.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
