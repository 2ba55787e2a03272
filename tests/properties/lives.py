"""Requests as a reference model knows them: from events and plans."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from scheduler.instance.plan import StepResult
from scheduler.request import Request
from scheduler.types import RequestId, RequestSpec, StartedEvent
from tests.factories import BLOCK_SIZE as SIZE


def next_token(spec: RequestSpec, position: int) -> int:
    """Return the same token wherever and with whomever the request runs."""
    key = f"{spec.params.seed} {spec.params.choice} {position}"
    return zlib.crc32(key.encode()) % 7


@dataclass
class Client:
    """What is known of a request from outside."""

    spec: RequestSpec
    ordinal: int
    rank: int
    arrival_s: float
    request: Request  # to tell this one from another of the same name
    tokens: list[int]
    num_preemptions: int = 0
    started: StartedEvent | None = None  # what its first admission makes of it
    is_announced: bool = False  # by an event

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.spec.prompt_token_ids)

    @property
    def waiting_order(self) -> tuple[int, bool, int]:
        return (self.rank, self.num_preemptions == 0, self.ordinal)


@dataclass(eq=False)
class Life:
    """A request from an admission to its end or preemption, as an executor sees it."""

    client: Client
    order: tuple[int, int]  # rank and admission
    tokens: list[int]  # those that are sampled and not yet reported too
    blocks: list[int]
    num_computed: int
    failed: bool = False

    @property
    def name(self) -> RequestId:
        return self.client.spec.request_id

    def content(self, position: int) -> tuple:
        spec = self.client.spec
        return (spec.tenant, spec.cache_salt, *self.tokens[: position + 1])

    def slot(self, position: int) -> tuple[int, int]:
        return self.blocks[position // SIZE], position % SIZE


@dataclass
class Step:
    """A step that was computed: its result, whose tokens these are, and who touched which block."""

    result: StepResult
    sampled_by: list[Life]
    only_computed: list[Life] = field(default_factory=list)  # those whose chunk sampled nothing
    touched: dict[int, set[Life]] = field(default_factory=dict)
