"""What is known of one instance that is up: what was sent there, and what it reported last.

A report is older than what was sent after it. What is on its way counts by this ledger until a
report covers it: `InstanceView.num_given` says how much of what was sent the instance had got, so
nothing is guessed from clocks.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from scheduler.cluster.events import InstanceCapacity
from scheduler.cluster.freeness import dispatch_freeness, running_freeness
from scheduler.load import InstanceView
from scheduler.types import InstanceId, RequestId

# Requests beyond those that may run, as a share of them, so that whoever ends has a successor
# there already.
_SPARE_SHARE = 4


class InstanceLoad(NamedTuple):
    """What a dispatch policy may know of an instance."""

    instance_id: InstanceId
    num_requests: int
    max_num_running: int
    num_waiting_tokens: int  # to be computed before requests that are there have a first token
    freeness: float  # in steps; may be negative


class _Sent(NamedTuple):
    number: int
    num_blocks: int


class _Entry(NamedTuple):
    rank: int
    num_tokens: int  # known when it was sent


class Ledger:
    """One instance, from when it came up. Only `ClusterScheduler` and its `Trials` write here."""

    __slots__ = (
        "_in_flight",
        "_is_trusted",
        "_load",
        "_max_num_assigned",
        "_num_by_rank",
        "_num_headroom_blocks",
        "_num_in_flight_blocks",
        "_num_sent",
        "_waiting",
        "_waiting_tokens",
        "assigned",
        "capacity",
        "instance_id",
        "is_draining",
        "num_waiting_tokens",
        "trial",
        "view",
    )

    def __init__(
        self,
        instance_id: InstanceId,
        capacity: InstanceCapacity,
        *,
        is_draining: bool = False,
        is_trusted: bool = True,
        headroom_tokens: int = 0,
    ) -> None:
        """`is_trusted` is off only to show what dispatch by reports alone would do."""
        self.instance_id = instance_id
        self.capacity = capacity
        self.view = InstanceView.idle(capacity.num_blocks)  # until the first report
        self.is_draining = is_draining
        self.trial: RequestId | None = None  # see `suspicion`
        self.assigned: dict[RequestId, _Entry] = {}
        self.num_waiting_tokens = 0  # of those that have no token since they were sent
        self._max_num_assigned = -(-capacity.max_num_running * (_SPARE_SHARE + 1) // _SPARE_SHARE)
        self._waiting: set[RequestId] = set()  # no token of them since they were sent
        self._num_by_rank: dict[int, int] = {}
        self._waiting_tokens: dict[int, int] = {}  # by rank
        self._in_flight: deque[_Sent] = deque()  # sent and in no report yet
        self._num_in_flight_blocks = 0
        self._num_sent = 0
        self._is_trusted = is_trusted
        self._num_headroom_blocks = capacity.num_blocks_of(headroom_tokens)
        self._load: InstanceLoad | None = None  # until something changes

    # --- what happens ---

    def send(self, request_id: RequestId, rank: int, num_tokens: int) -> None:
        """A request of so many known tokens is handed to the instance."""
        self.assigned[request_id] = _Entry(rank, num_tokens)
        self._waiting.add(request_id)
        self._num_by_rank[rank] = self._num_by_rank.get(rank, 0) + 1
        self._waiting_tokens[rank] = self._waiting_tokens.get(rank, 0) + num_tokens
        self.num_waiting_tokens += num_tokens
        self._num_sent += 1
        num_blocks = self.capacity.num_blocks_of(num_tokens)
        self._in_flight.append(_Sent(self._num_sent, num_blocks))
        self._num_in_flight_blocks += num_blocks
        self._load = None

    def began(self, request_id: RequestId) -> None:
        """The first token of a request came from there."""
        entry = self.assigned.get(request_id)
        if entry is not None and request_id in self._waiting:
            self._waiting.remove(request_id)
            _take(self._waiting_tokens, entry.rank, entry.num_tokens)
            self.num_waiting_tokens -= entry.num_tokens
            self._load = None

    def ended(self, request_id: RequestId) -> None:
        """The instance has nothing of the request any more."""
        self.began(request_id)
        if self.trial == request_id:
            self.trial = None
        entry = self.assigned.pop(request_id, None)
        if entry is not None:
            _take(self._num_by_rank, entry.rank, 1)
            self._load = None

    def report(self, view: InstanceView) -> None:
        self.view = view
        while self._in_flight and self._in_flight[0].number <= view.num_given:
            self._num_in_flight_blocks -= self._in_flight.popleft().num_blocks
        self._load = None

    def drain(self) -> None:
        """It gets nothing new from now on."""
        self.is_draining = True
        self._load = None

    # --- what follows ---

    def has_room(self, rank: int) -> bool:
        """Whether a request would compute there soon; else it waits here, where it can be moved.

        Those of a higher rank number do not count, up to a bound: the instance lets them wait, or
        give way. While less waits than keeps it busy, a request of any length may come; but none
        beside one on trial that has no token, or its death there would prove nothing.
        """
        if self.is_draining or len(self.assigned) >= 2 * self._max_num_assigned:
            return False
        if self.trial in self._waiting:
            return False
        most, max_num_waiting_tokens = self._max_num_assigned, self.capacity.max_num_waiting_tokens
        # All of them are few, mostly; only else is it asked whose they are.
        if len(self.assigned) >= most and _up_to(self._num_by_rank, rank) >= most:
            return False
        return (
            self.num_waiting_tokens < max_num_waiting_tokens
            or _up_to(self._waiting_tokens, rank) < max_num_waiting_tokens
        )

    def awaits_token(self, request_id: RequestId) -> bool:
        """Whether no token of it came since it was sent there."""
        return request_id in self._waiting

    def is_free(self, rank: int) -> bool:
        """Whether a request would compute there at once, and by itself be on trial."""
        return (
            not self.is_draining
            and self.trial is None
            and _up_to(self._num_by_rank, rank) < self.capacity.max_num_running
            and not _up_to(self._waiting_tokens, rank)
        )

    def has_memory(self, num_tokens: int) -> bool:
        """Whether so many tokens need not wait for memory; an empty instance has all of it."""
        if not self.assigned:
            return True
        num_free_blocks = self.view.num_free_blocks - self._num_in_flight_blocks
        return self.capacity.num_blocks_of(num_tokens) <= num_free_blocks

    def load(self) -> InstanceLoad:
        """Return what policies go by; made anew when something changed, as all are asked often."""
        if self._load is None:
            num_requests, num_waiting_tokens = len(self.assigned), self.num_waiting_tokens
            if not self._is_trusted:
                num_requests = self.view.num_running + self.view.num_waiting
                num_waiting_tokens = 0
            self._load = InstanceLoad(
                self.instance_id,
                num_requests,
                self.capacity.max_num_running,
                num_waiting_tokens,
                self._dispatch_freeness(),
            )
        return self._load

    def state(self) -> dict[str, Any]:
        """Return it as plain data for people, of no fixed form."""
        return {
            "num_assigned": len(self.assigned),
            "num_waiting_tokens": self.num_waiting_tokens,
            "freeness": self.freeness,
            "draining": self.is_draining,
            "trial": self.trial,
        }

    @property
    def freeness(self) -> float:
        """The steps that its memory lasts as it runs now; of one that drains, all is taken."""
        if self.is_draining:
            return float("-inf")
        return running_freeness(self.capacity, self.view, self._headroom())

    def _dispatch_freeness(self) -> float:
        if self.is_draining:
            return float("-inf")
        sent = (len(self._in_flight), self._num_in_flight_blocks) if self._is_trusted else (0, 0)
        return dispatch_freeness(self.capacity, self.view, self._headroom(), *sent)

    def _headroom(self) -> int:
        """Return the blocks that those of high priority shall have beside what they hold."""
        is_shared = any(rank < 0 for rank in self._num_by_rank)
        return self._num_headroom_blocks if is_shared else 0


def _take(counts: dict[int, int], rank: int, amount: int) -> None:
    counts[rank] -= amount
    if not counts[rank]:
        del counts[rank]


def _up_to(counts: dict[int, int], rank: int) -> int:
    return sum(count for key, count in counts.items() if key <= rank)
