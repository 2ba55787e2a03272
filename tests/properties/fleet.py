"""Drives a cluster scheduler through one random history of a fleet, beside a small model of it.

The model knows each client and each instance from what was told and done: it counts from scratch
what ledgers keep in tallies. After every event the actions are checked against it, and the
invariants C1 to C4 of `scheduler.cluster.scheduler`. Instances are late: they take commands, and
are heard, some time after. A *poison* kills each instance that begins to compute it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scheduler.cluster.dispatch import DISPATCH_POLICIES
from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    ClusterEvent,
    Dispatch,
    DrainStarted,
    Elapsed,
    Ended,
    Fail,
    FailReason,
    FirstToken,
    InstanceCapacity,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    MoveAway,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec
from tests.factories import make_capacity, make_spec, make_view

NUM_STEPS = 250
QUARANTINE_S = 600.0


@dataclass(eq=False)
class Client:
    """A request from its acceptance to its end."""

    spec: RequestSpec
    ordinal: int
    at: InstanceId | None = None
    is_cancelled: bool = False
    is_poison: bool = False
    num_losses: int = 0
    strikes: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.spec.priority, self.ordinal

    @property
    def is_doubtful(self) -> bool:
        return self.strikes >= 2

    def fits(self, capacity: InstanceCapacity) -> bool:
        return capacity.fits(len(self.spec.prompt_token_ids) + self.spec.params.max_tokens)


class Owed(NamedTuple):
    """What an instance was sent and has not let go of."""

    client: Client
    is_trial: bool
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
    num_sent: int = 0
    num_given: int = 0
    num_covered: int = 0  # of those sent, by the last report that was heard

    def num_waiting_tokens(self, rank: float = float("inf")) -> int:
        return sum(
            len(owed.client.spec.prompt_token_ids)
            for owed in self.owed.values()
            if not owed.has_begun and owed.client.spec.priority <= rank
        )

    def may_take(self, client: Client) -> bool:
        """Whether it fits there, has room there, and nothing of it is there still."""
        rank, most = client.spec.priority, self.capacity.max_num_running
        ahead = sum(owed.client.spec.priority <= rank for owed in self.owed.values())
        is_trying = any(owed.is_trial and not owed.has_begun for owed in self.owed.values())
        return (
            not self.is_draining
            and client.fits(self.capacity)
            and client.spec.request_id not in self.owed
            and ahead < most + -(-most // 4)
            and self.num_waiting_tokens(rank) < self.capacity.max_num_waiting_tokens
            and not (client.is_doubtful and is_trying)
        )


class Fleet:
    """One history. All that is random is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.config = ClusterConfig(
            dispatch=rng.choice(list(DISPATCH_POLICIES)),
            prefix_affinity=rng.random() < 0.5,
            max_num_waiting=rng.choice([0, 3, 20]),
            continuation_timeout_s=10.0,
            max_num_losses=rng.choice([1, 3, 32]),
            seed=seed,
            uses_ledger=rng.random() < 0.9,
        )
        self.cluster = ClusterScheduler(self.config, rank=lambda spec: spec.priority)
        self.twin = ClusterScheduler(self.config, rank=lambda spec: spec.priority)
        # Either instances die by themselves, or of one poison at a time and of nothing else.
        self.kills = rng.random() < 0.6
        self.stems = [tuple(rng.randrange(9) for _ in range(150)) for _ in range(3)]
        self.now = 0.0
        self.is_draining = False
        self.alone_since_s: float | None = None
        self.clients: dict[RequestId, Client] = {}
        self.instances: dict[InstanceId, Instance] = {}
        self.quarantined: dict[tuple[int, ...], float] = {}
        self.num_deaths_of: Counter[Client] = Counter()
        self.num_accepted = self.num_ended = 0
        self.seen: Counter[str] = Counter()

    # --- the history ---

    def play(self) -> Counter[str]:
        for _ in range(self.rng.randint(1, 3)):
            self._up()
        turns = [
            *[self._arrive] * 8,
            *[self._compute] * 12,
            *[self._hear] * 12,
            *[self._report] * 3,
            *[self._up] * 3,
            *[self._cancel, self._elapse],
        ]
        rare = [self._drain_one, self._take_out, self._move_away, self._kill, self._kill]
        for _ in range(NUM_STEPS):
            turn = self.rng.choice(rare if self.rng.random() < 0.06 else turns)
            turn()
        if self.rng.random() < 0.5:
            self.is_draining = True
            self.tell(DrainStarted())
        self._quiesce()
        return self.seen

    def _arrive(self) -> None:
        rng = self.rng
        length = rng.choice([1, 3, 20, 70, 140])
        prompt = (*rng.choice(self.stems)[:length], rng.randrange(50))
        name = f"r{rng.randrange(40)}"
        spec = make_spec(name, prompt, max_tokens=rng.choice([1, 8, 60]))
        # One poison after another: whoever is at a death of each is rightly suspected.
        is_poison = not self.kills and rng.random() < 0.1 and not self._suspects()
        if is_poison:
            spec = replace(spec, prompt_token_ids=(999, *prompt))
        self._ask(replace(spec, priority=rng.choice([0, 0, 0, -1, 1])), is_poison=is_poison)

    def _ask(self, spec: RequestSpec, *, is_poison: bool) -> None:
        expected = self._refusal(spec)
        if expected is None:
            client = Client(spec, self.num_accepted, is_poison=is_poison)
            self.clients[spec.request_id] = client
            self.num_accepted += 1
        rejected = [a for a in self.tell(Arrived(spec)) if isinstance(a, Reject)]
        assert rejected == ([] if expected is None else [Reject(spec.request_id, expected)])

    def _refusal(self, spec: RequestSpec) -> RejectReason | None:
        client = Client(spec, 0)
        fitting = [one for one in self.instances.values() if client.fits(one.capacity)]
        num_running = sum(one.capacity.max_num_running for one in self.instances.values())
        if self.is_draining or not self._open():
            return RejectReason.NO_INSTANCE
        if spec.request_id in self.clients:
            return RejectReason.DUPLICATE_ID
        if self.quarantined.get(spec.prompt_token_ids, 0.0) > self.now:
            return RejectReason.QUARANTINED
        if not fitting:
            return RejectReason.NEVER_FITS
        if all(one.is_draining for one in fitting):
            return RejectReason.NO_INSTANCE
        if len(self.clients) >= num_running + self.config.max_num_waiting:
            return RejectReason.QUEUE_FULL
        return None

    def _compute(self) -> None:
        """An instance takes a command, or something becomes of a request that it has."""
        one = self._any_instance()
        if one is None:
            return
        if one.inbox and self.rng.random() < 0.6:
            what, client = one.inbox.popleft()
            name = client.spec.request_id
            if what == "submit":
                assert name not in one.has
                one.num_given += 1
                one.has[name] = client, False
            elif one.has.pop(name, None) is not None:
                one.outbox.append(Ended(name, one.name))
        elif one.has:
            name = self.rng.choice(list(one.has))
            client, has_token = one.has[name]
            if client.is_poison and not has_token:
                self._die(one)
            elif not has_token and self.rng.random() < 0.8:
                one.has[name] = client, True
                one.outbox.append(FirstToken(name, one.name))
            else:
                del one.has[name]
                one.outbox.append(Ended(name, one.name))

    def _hear(self, one: Instance | None = None) -> None:
        one = one or self._any_instance()
        if one is None or not one.outbox:
            return
        event = one.outbox.popleft()
        match event:
            case Reported(_, view):
                one.num_covered = view.num_given
            case FirstToken(request_id):
                owed = one.owed[request_id]
                if owed.client.at == one.name:
                    one.owed[request_id] = owed._replace(has_begun=True)
                    owed.client.strikes = 0
            case Ended(request_id):
                client = one.owed.pop(request_id).client
                if client.at == one.name:
                    self._ended(client)
        self.tell(event)

    def _report(self, one: Instance | None = None) -> None:
        one = one or self._any_instance()
        if one is not None:
            running = [client for client, has_token in one.has.values() if has_token]
            waiting = [client for client, has_token in one.has.values() if not has_token]
            view = make_view(
                num_running=len(running),
                num_waiting=len(waiting),
                num_waiting_tokens=sum(len(one.spec.prompt_token_ids) for one in waiting),
                num_free_blocks=max(0, 64 - 3 * len(running)),
                num_given=one.num_given,
            )
            one.outbox.append(Reported(one.name, view))

    def _cancel(self) -> None:
        if self.clients:
            client = self.rng.choice(list(self.clients.values()))
            was_cancelled, at = client.is_cancelled, client.at
            client.is_cancelled = True
            if at is None:
                self._ended(client)
            num_output_tokens = self.rng.choice([None, 3])
            actions = self.tell(Cancelled(client.spec.request_id, num_output_tokens))
            aborts = [action for action in actions if isinstance(action, Abort)]
            abort = Abort(client.spec.request_id, at or InstanceId(""), num_output_tokens)
            assert aborts == ([] if at is None or was_cancelled else [abort])

    def _up(self) -> None:
        name = InstanceId(f"i{self.rng.randrange(4)}")
        if name not in self.instances:
            capacity = make_capacity(
                max_num_running=self.rng.randint(1, 5),
                max_num_waiting_tokens=self.rng.choice([1, 60, 300]),
                max_model_len=self.rng.choice([100, 256, 256]),
            )
            self.instances[name] = Instance(name, capacity)
            self.tell(InstanceUp(name, capacity))

    def _kill(self) -> None:
        one = self._any_instance()
        if one is not None and self.kills:
            self._die(one)
            if self.rng.random() < 0.5:  # those who went on lose another one at once
                self._up()
                self._kill()

    def _take_out(self) -> None:
        one = self._any_instance()
        if one is not None:
            self._die(one, was_ours=True)

    def _drain_one(self) -> None:
        one = self._any_instance()
        if one is not None:
            one.is_draining = True
            self.tell(InstanceDraining(one.name))

    def _move_away(self) -> None:
        one = self._any_instance()
        if one is not None:
            moved = [client for client in self._at(one) if not client.is_cancelled]
            for client in moved:
                client.at = None
            self.seen["moved"] += len(moved)
            actions = self.tell(MoveAway(one.name))
            aborts = [action for action in actions if isinstance(action, Abort)]
            assert aborts == [Abort(client.spec.request_id, one.name) for client in moved]

    def _elapse(self) -> None:
        self.now += self.rng.choice([0.1, 1.0, 6.0])
        self.tell(Elapsed())

    def _die(self, one: Instance, *, was_ours: bool = False) -> None:
        del self.instances[one.name]
        there, failed = self._at(one), {}
        if not was_ours:
            failed = self._blame(there, is_clear=len(there) == len(one.owed))
        for client in there:
            client.at = None
            if client.is_cancelled:
                self._ended(client)
        actions = self.tell(InstanceDown(one.name, was_ours))
        got = {action.request_id: action.reason for action in actions if isinstance(action, Fail)}
        assert failed.items() <= got.items()
        others = {got[name] for name in got.keys() - failed.keys()}
        assert others <= {FailReason.NO_INSTANCE}

    def _blame(self, there: list[Client], *, is_clear: bool) -> dict[RequestId, FailReason]:
        failed = {}
        for client in there:
            client.num_losses += 1
            client.strikes += is_clear
            self.num_deaths_of[client] += is_clear
            if client.num_losses > self.config.max_num_losses and not client.is_cancelled:
                failed[client.spec.request_id] = FailReason.TOO_MANY_LOSSES
        most = max((client.strikes for client in there), default=0)
        worst = [client for client in there if client.strikes == most]
        if most >= 2 and len(worst) == 1 and is_clear:
            (blamed,) = worst
            self.quarantined[blamed.spec.prompt_token_ids] = self.now + QUARANTINE_S
            if not blamed.is_cancelled:
                failed[blamed.spec.request_id] = FailReason.QUARANTINED
            assert self.kills or blamed.is_poison, "an innocent is blamed"
        for client in there:
            assert not client.is_poison or self.num_deaths_of[client] <= 3
        return failed

    def _quiesce(self) -> None:
        """Let everything come to its end; then nothing may be left of anything."""
        for round_ in range(4000):
            if not self.clients and not any(one.owed for one in self.instances.values()):
                break
            self._elapse() if round_ % 20 == 0 else self.rng.choice([self._compute, self._hear])()
        for one in self.instances.values():
            self._report(one)
            while one.outbox:
                self._hear(one)
        cluster = self.cluster
        assert not self.clients, "a request never ended"
        assert self.num_ended == self.num_accepted
        assert not cluster._requests
        assert not cluster._doubtful
        assert not cluster._queue.all()
        assert cluster._queue.head() is None
        assert not cluster._queue._heap
        for ledger in cluster.ledgers().values():
            assert not ledger.assigned
            assert not ledger._waiting
            assert not ledger._num_by_rank
            assert not ledger._waiting_tokens
            assert not ledger._in_flight
            assert ledger.doubtful is None

    # --- what the scheduler does about it ---

    def tell(self, event: ClusterEvent) -> list:
        if self._open():
            self.alone_since_s = None
        elif self.alone_since_s is None and not isinstance(event, Arrived):
            self.alone_since_s = self.now
        actions = self.cluster.handle(event, self.now)
        assert actions == self.twin.handle(event, self.now), "the same events, another answer"
        sent: list[Client] = []
        for action in actions:
            self.seen[type(action).__name__] += 1
            match action:
                case Dispatch(spec, instance_id):
                    sent.append(self._dispatched(spec, self.instances[instance_id]))
                case Abort(request_id, instance_id):
                    one = self.instances[instance_id]
                    one.inbox.append(("abort", one.owed[request_id].client))
                case Fail(request_id, reason):
                    self._failed(self.clients[request_id], reason)
                case Reject():
                    assert isinstance(event, Arrived)
        if not isinstance(event, Reported):
            self._check_queue(sent)
        self._check()
        return actions

    def _dispatched(self, spec: RequestSpec, one: Instance) -> Client:
        client = self.clients[spec.request_id]
        assert client.spec is spec
        assert client.at is None, "C1: it is queued before it is sent"
        assert one.may_take(client), "C2, C3, or there was no room"
        self.seen["replays"] += client.num_losses > 0
        self.seen["trials"] += client.is_doubtful
        client.at = one.name
        one.owed[spec.request_id] = Owed(client, is_trial=client.is_doubtful)
        one.num_sent += 1
        one.inbox.append(("submit", client))
        return client

    def _failed(self, client: Client, reason: FailReason) -> None:
        assert client.at is None
        self.seen[reason] += 1
        if reason is FailReason.NO_INSTANCE:
            assert self._is_given_up() or self._fits_nowhere(client)
        self._ended(client)

    def _ended(self, client: Client) -> None:
        """C4: once, as it is taken out here."""
        del self.clients[client.spec.request_id]
        client.at = None
        self.num_ended += 1

    # --- what must hold ---

    def _check_queue(self, sent: list[Client]) -> None:
        """Those sent came before those that wait, and whoever is first cannot go."""
        in_order = [client for client in sent if not client.is_doubtful]
        orders = [client.order for client in in_order]
        assert orders == sorted(orders)
        queued = [client for client in self.clients.values() if client.at is None]
        line = sorted((one for one in queued if not one.is_doubtful), key=lambda one: one.order)
        assert not (orders and line) or orders[-1] < line[0].order, "one went past the head"
        for client in [*line[:1], *(one for one in queued if one.is_doubtful)]:
            assert not any(one.may_take(client) for one in self.instances.values())
            assert not self._fits_nowhere(client)
        assert not (queued and self._is_given_up()), "they wait for ever"

    def _check(self) -> None:
        cluster = self.cluster
        assert cluster.num_queued == sum(one.at is None for one in self.clients.values())
        for name, client in self.clients.items():
            assert cluster.owner(name) == client.at
        for one in self.instances.values():
            ledger = cluster.ledgers()[one.name]
            assert ledger.assigned.keys() == one.owed.keys()
            assert len(ledger._in_flight) == one.num_sent - one.num_covered
            if self.config.uses_ledger:
                assert ledger.load().num_waiting_tokens == one.num_waiting_tokens()

    # --- what is asked often ---

    def _open(self) -> list[Instance]:
        return [one for one in self.instances.values() if not one.is_draining]

    def _at(self, one: Instance) -> list[Client]:
        return [owed.client for owed in one.owed.values() if owed.client.at == one.name]

    def _suspects(self) -> bool:
        owed = (owed.client for one in self.instances.values() for owed in one.owed.values())
        return any(one.is_poison or one.strikes for one in (*owed, *self.clients.values()))

    def _fits_nowhere(self, client: Client) -> bool:
        takers = self._open()
        return bool(takers) and not any(client.fits(one.capacity) for one in takers)

    def _is_given_up(self) -> bool:
        since_s = self.alone_since_s
        return since_s is not None and self.now - since_s >= self.config.continuation_timeout_s

    def _any_instance(self) -> Instance | None:
        return self.rng.choice(list(self.instances.values())) if self.instances else None
