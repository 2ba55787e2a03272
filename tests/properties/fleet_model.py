"""Clients and instances as a small model of a fleet knows them: from what was told and done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.cluster.events import ClusterEvent, InstanceCapacity
from scheduler.cluster.suspicion import Fingerprint, fingerprint
from scheduler.types import InstanceId, RequestId, RequestSpec


@dataclass(eq=False)
class Client:
    """A request from its acceptance to its end."""

    spec: RequestSpec
    ordinal: int
    at: InstanceId | None = None
    is_cancelled: bool = False
    is_poison: bool = False
    num_losses: int = 0
    is_tried: bool = False  # where it is

    @property
    def key(self) -> Fingerprint:
        return fingerprint(self.spec)

    @property
    def order(self) -> tuple[int, int]:
        return self.spec.priority, self.ordinal

    def fits(self, capacity: InstanceCapacity) -> bool:
        return capacity.fits(len(self.spec.prompt_token_ids) + self.spec.params.max_tokens)


class Owed(NamedTuple):
    """What an instance was sent and has not let go of."""

    client: Client
    num_tokens: int
    has_begun: bool = False


@dataclass(eq=False)
class Instance:
    """One incarnation: what it was sent, and what it has taken of that."""

    name: InstanceId
    capacity: InstanceCapacity
    is_draining: bool = False
    owed: dict[RequestId, Owed] = field(default_factory=dict)
    has: dict[RequestId, tuple[Client, bool]] = field(default_factory=dict)  # with a token?
    inbox: deque[tuple[str, Client]] = field(default_factory=deque)
    outbox: deque[ClusterEvent] = field(default_factory=deque)
    trial: RequestId | None = None
    num_sent: int = 0
    num_given: int = 0
    num_covered: int = 0  # of those sent, by the last report that was heard

    def num_waiting_tokens(self, rank: float = float("inf")) -> int:
        return sum(
            owed.num_tokens
            for owed in self.owed.values()
            if not owed.has_begun and owed.client.spec.priority <= rank
        )

    def may_take(self, client: Client) -> bool:
        """Whether it fits there, has room there, and nothing of it is there still."""
        rank, most = client.spec.priority, self.capacity.max_num_running
        ahead = sum(owed.client.spec.priority <= rank for owed in self.owed.values())
        places = most + -(-most // 4)
        return (
            not self.is_draining
            and client.fits(self.capacity)
            and client.spec.request_id not in self.owed
            and ahead < places
            and len(self.owed) < 2 * places
            and self.num_waiting_tokens(rank) < self.capacity.max_num_waiting_tokens
            and not (self.trial in self.owed and not self.owed[self.trial].has_begun)
        )

    def may_try(self, client: Client) -> bool:
        """Whether it would compute there at once, if memory is free."""
        rank = client.spec.priority
        ahead = sum(owed.client.spec.priority <= rank for owed in self.owed.values())
        return (
            not self.is_draining
            and self.trial is None
            and client.fits(self.capacity)
            and client.spec.request_id not in self.owed
            and ahead < self.capacity.max_num_running
            and not self.num_waiting_tokens(rank)
        )
