"""Drives a cluster scheduler through one random history of a fleet, beside a small model of it.

The model knows each client and each instance from what was told and done: it counts from scratch
what ledgers keep in tallies. After every event the actions are checked against it, and the
invariants C1 to C4 of `scheduler.cluster.scheduler`. Instances are late: they take commands, and
are heard, some time after. A *poison* kills each instance that begins to compute it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from scheduler.cluster.dispatch import DISPATCH_POLICIES
from scheduler.cluster.events import (
    PROGRESS_MARKS,
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
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    MoveAway,
    Progressed,
    Reject,
    Reported,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.cluster.suspicion import QUARANTINE_S, Fingerprint, fingerprint
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec
from tests.factories import make_capacity, make_spec, make_view
from tests.properties.fleet_model import Client, Instance, Owed

NUM_STEPS = 250


class Fleet:
    """One history. All that is random is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.config = ClusterConfig(
            dispatch=rng.choice(list(DISPATCH_POLICIES)),
            prefix_affinity=rng.random() < 0.5,
            prefix_caching=rng.random() < 0.7,
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
        self.quarantined: dict[Fingerprint, float] = {}
        self.num_deaths_of: Counter[Fingerprint] = Counter()
        self.poisons: set[int] = set()
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
            self.poisons.add(fingerprint(spec)[2])
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
        if self.quarantined.get(fingerprint(spec), 0.0) > self.now:
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
            elif has_token and self.rng.random() < 0.3:
                number = self.rng.choice(sorted(PROGRESS_MARKS))
                one.outbox.append(Progressed(name, one.name, number))
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
        trial = self.cluster.ledgers()[one.name].trial
        tried = {client.key for client in there if client.spec.request_id == trial}
        if not was_ours:
            failed = self._losses(there, is_clear=len(there) == len(one.owed))
        for client in there:
            client.at = None
            if client.is_cancelled:
                self._ended(client)
        actions = self.tell(InstanceDown(one.name, was_ours))
        got = {action.request_id: action.reason for action in actions if isinstance(action, Fail)}
        assert failed.items() <= got.items()
        others = {got[name] for name in got.keys() - failed.keys()}
        assert others <= {FailReason.NO_INSTANCE, FailReason.QUARANTINED}
        condemned = self.cluster._trials._suspicion._condemned.keys() - self.quarantined.keys()
        assert condemned <= tried, "only who was on trial is condemned"
        assert not condemned or not was_ours
        self.quarantined |= dict.fromkeys(condemned, self.now + QUARANTINE_S)
        assert self.kills or all(key[2] in self.poisons for key in condemned), "an innocent"
        goes_on = [one for one in self.clients.values() if not one.is_cancelled]
        assert not any(client.key in condemned for client in goes_on)

    def _losses(self, there: list[Client], *, is_clear: bool) -> dict[RequestId, FailReason]:
        failed = {}
        for client in there:
            client.num_losses += 1
            self.num_deaths_of[client.key] += is_clear
            if client.num_losses > self.config.max_num_losses and not client.is_cancelled:
                failed[client.spec.request_id] = FailReason.TOO_MANY_LOSSES
            assert not client.is_poison or self.num_deaths_of[client.key] <= 4
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
        assert not cluster._trials.waiting
        assert not cluster._queue.all()
        assert cluster._queue.head() is None
        assert not cluster._queue._heap
        for ledger in cluster.ledgers().values():
            assert not ledger.assigned
            assert not ledger._waiting
            assert not ledger._num_by_rank
            assert not ledger._waiting_tokens
            assert not ledger._in_flight
            assert ledger.trial is None

    # --- what the scheduler does about it ---

    def tell(self, event: ClusterEvent) -> list:
        if self._open():
            self.alone_since_s = None
        elif self.alone_since_s is None and not isinstance(event, Arrived):
            self.alone_since_s = self.now
        actions = self.cluster.handle(event, self.now)
        for one in self.instances.values():  # a trial may be over; one that begins is seen below
            if self.cluster.ledgers()[one.name].trial != one.trial or one.trial not in one.owed:
                one.trial = None
        assert actions == self.twin.handle(event, self.now), "the same events, another answer"
        sent: list[Client] = []
        for action in actions:
            self.seen[type(action).__name__] += 1
            match action:
                case Dispatch(spec, instance_id):
                    sent.append(self._dispatched(spec, self.instances[instance_id]))
                case Abort(request_id, instance_id):
                    one = self.instances[instance_id]
                    client = one.owed[request_id].client
                    one.inbox.append(("abort", client))
                    if isinstance(event, InstanceDown) and not client.is_cancelled:
                        client.at = None  # called back, for its trial
                        self.seen["called back"] += 1
                case Fail(request_id, reason):
                    self._failed(self.clients[request_id], reason)
                case Reject():
                    assert isinstance(event, Arrived)
        if not isinstance(event, Reported):
            self._check_queue(sent)
        self._check()
        return actions

    def _dispatched(self, spec: RequestSpec, one: Instance) -> Client:
        client, ledger = self.clients[spec.request_id], self.cluster.ledgers()[one.name]
        assert client.spec is spec
        assert client.at is None, "C1: it is queued before it is sent"
        client.is_tried = ledger.trial == spec.request_id
        can = one.may_try(client) if client.is_tried else one.may_take(client)
        assert can, "C2, C3, or there was no room"
        assert not client.is_tried or self._is_clean(one)
        on_trial = [
            self.clients.get(other.trial) for other in self.instances.values() if other.trial
        ]
        assert not client.is_tried or all(
            other is None or other.key != client.key for other in on_trial
        )
        self.seen["replays"] += client.num_losses > 0
        self.seen["trials"] += client.is_tried
        client.at = one.name
        num_tokens = ledger.assigned[spec.request_id].num_tokens
        assert 0 < num_tokens <= len(spec.prompt_token_ids)
        assert self.config.prefix_caching or num_tokens == len(spec.prompt_token_ids)
        one.owed[spec.request_id] = Owed(client, num_tokens)
        one.trial = spec.request_id if client.is_tried else one.trial
        one.num_sent += 1
        one.inbox.append(("submit", client))
        return client

    def _failed(self, client: Client, reason: FailReason) -> None:
        self.seen[reason] += 1
        if client.at is not None:  # one like it was condemned; it is still where it was
            assert reason is FailReason.QUARANTINED
            client.is_cancelled = True
            return
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
        orders = [client.order for client in sent if not client.is_tried]
        assert orders == sorted(orders)
        queued = [client for client in self.clients.values() if client.at is None]
        trials = self.cluster._trials
        waiting = {request.request_id for request in trials.waiting}
        doubtful = [one for one in queued if one.spec.request_id in waiting]
        line = sorted((one for one in queued if one not in doubtful), key=lambda one: one.order)
        assert not (orders and line) or orders[-1] < line[0].order, "one went past the head"
        up = self.instances.values()
        tried = {self.clients[one.trial].key for one in up if one.trial in self.clients}
        untried = [client for client in doubtful if client.key not in tried]
        for client in untried:
            for one in up:
                ledger = self.cluster.ledgers()[one.name]
                has_memory = ledger.has_memory(len(client.spec.prompt_token_ids))
                assert not (one.may_try(client) and self._is_clean(one) and has_memory)
        first = min(untried, key=lambda one: one.order, default=None)
        for client in line[:1]:
            for one in (one for one in up if one.may_take(client)):
                is_held = (
                    first is not None
                    and one.name == trials._reserved
                    and first.order[0] <= client.order[0]
                )
                would_spoil = one.trial and self._is_repeated(client)
                assert is_held or would_spoil, "it could go there"
        if trials._reserved is not None:
            one = self.instances[trials._reserved]
            assert not one.trial
            assert not one.is_draining
            assert first is not None, "it waits for nobody"
            assert first.fits(one.capacity)
        for client in (*line[:1], *untried):
            assert not self._fits_nowhere(client)
        assert not (queued and self._is_given_up()), "they wait for ever"

    def _is_clean(self, one: Instance) -> bool:
        return not any(map(self._is_repeated, self._at(one)))

    def _is_repeated(self, client: Client) -> bool:
        suspect = self.cluster._trials._suspicion._suspects.get(client.key)
        return suspect is not None and len(suspect.deaths) > 1

    def _check(self) -> None:
        cluster = self.cluster
        assert cluster.num_queued == sum(one.at is None for one in self.clients.values())
        for name, client in self.clients.items():
            assert cluster.owner(name) == client.at
        for one in self.instances.values():
            ledger = cluster.ledgers()[one.name]
            assert ledger.assigned.keys() == one.owed.keys()
            assert ledger.trial is None or ledger.trial in one.owed
            assert len(ledger._in_flight) == one.num_sent - one.num_covered
            assert ledger.num_waiting_tokens == one.num_waiting_tokens()

    # --- what is asked often ---

    def _open(self) -> list[Instance]:
        return [one for one in self.instances.values() if not one.is_draining]

    def _at(self, one: Instance) -> list[Client]:
        return [owed.client for owed in one.owed.values() if owed.client.at == one.name]

    def _suspects(self) -> bool:
        owed = (owed.client for one in self.instances.values() for owed in one.owed.values())
        is_poisoned = any(one.is_poison for one in (*owed, *self.clients.values()))
        return is_poisoned or not self.cluster._trials._suspicion.is_empty()

    def _fits_nowhere(self, client: Client) -> bool:
        takers = self._open()
        return bool(takers) and not any(client.fits(one.capacity) for one in takers)

    def _is_given_up(self) -> bool:
        since_s = self.alone_since_s
        return since_s is not None and self.now - since_s >= self.config.continuation_timeout_s

    def _any_instance(self) -> Instance | None:
        return self.rng.choice(list(self.instances.values())) if self.instances else None
