"""A cluster scheduler's instances as its tests play them: they die of poisons, and of kills.

A *poison* kills each instance that it was sent to: before it has a token there, or after so many.
"""

from __future__ import annotations

from dataclasses import replace

from scheduler.cluster.events import (
    PROGRESS_MARKS,
    Abort,
    Arrived,
    Dispatch,
    Ended,
    Fail,
    FirstToken,
    InstanceDown,
    InstanceUp,
    Progressed,
    Reject,
)
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.cluster.suspicion import (
    fingerprint,
)
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RequestId
from tests.factories import make_capacity, make_spec

A, B = InstanceId("i0"), InstanceId("i1")


class Fleet:
    """Instances that come back at once and obey at once, and die of poisons."""

    def __init__(self, num_instances, *, max_num_running=8, **settings):
        self.cluster = ClusterScheduler(
            ClusterConfig(dispatch="least_loaded", prefix_affinity=False, **settings),
            rank=lambda spec: spec.priority,
        )
        self.capacity = make_capacity(max_num_running=max_num_running)
        self.kills_after = {}  # so many tokens of a life
        self.num_tokens = {}  # where each is, of this life
        self.num_deaths = 0
        self.failed = {}
        self.refused = {}
        for index in range(num_instances):
            self.tell(InstanceUp(InstanceId(f"i{index}"), self.capacity))

    @property
    def where(self):
        return {name: instance_id for instance_id, name in self.num_tokens}

    def tell(self, event, now=0.0):
        actions = self.cluster.handle(event, now)
        for action in actions:
            match action:
                case Dispatch(spec, instance_id):
                    self.num_tokens[instance_id, spec.request_id] = 0
                case Fail(request_id, reason):
                    self.failed[request_id] = reason
                case Reject(request_id, reason):
                    self.refused[request_id] = reason
        for action in actions:
            if isinstance(action, Abort):
                self.end(action.request_id, action.instance_id)
        return actions

    def arrive(self, *names, kills_after=None, priority=0):
        """Those of the same first letter have the same prompt."""
        for name in names:
            if kills_after is not None:
                self.kills_after[name] = kills_after
            spec = make_spec(name, prompt=(ord(name[0]), *map(ord, name[1:2] * (name[0] == "b"))))
            self.tell(Arrived(replace(spec, priority=priority)))

    def kill(self, *instance_ids):
        """The instances die, and then new ones of their names are up."""
        for instance_id in instance_ids:
            self.num_deaths += 1
            for key in [key for key in self.num_tokens if key[0] == instance_id]:
                del self.num_tokens[key]
            self.tell(InstanceDown(instance_id))
        for instance_id in instance_ids:
            self.tell(InstanceUp(instance_id, self.capacity))

    def token(self, name):
        """It gets a token, or kills its instance."""
        key = self.where[name], RequestId(name)
        if self.num_tokens[key] >= self.kills_after.get(name, 10**9):
            self.kill(key[0])
            return
        self.num_tokens[key] += 1
        if self.num_tokens[key] == 1:
            self.tell(FirstToken(key[1], key[0]))
        if self.num_tokens[key] in PROGRESS_MARKS:
            self.tell(Progressed(key[1], key[0], self.num_tokens[key]))

    def end(self, name, instance_id=None):
        instance_id = instance_id or self.where[name]
        self.num_tokens.pop((instance_id, name), None)
        self.tell(Ended(RequestId(name), instance_id))

    def run(self, num_tokens, rng=None):
        """Each that runs gets so many tokens, one after the other, in whatever order."""
        for _ in range(num_tokens):
            names = list(self.where)
            if rng is not None:
                rng.shuffle(names)
            for name in names:
                if name in self.where:
                    self.token(name)


def doubtful(*names, num_instances=1):
    """Return a fleet where two instances died under these."""
    fleet = Fleet(num_instances)
    fleet.arrive(*names)
    for _ in range(2):
        fleet.kill(*(InstanceId(f"i{index}") for index in range(num_instances)))
    return fleet


def suspect(fleet, name, num_deaths=2, num_tokens=0):
    for _ in range(num_deaths):
        key = fingerprint(make_spec(prompt=(ord(name[0]),)))
        stranger = fingerprint(make_spec(prompt=(1, 2, 3)))  # who is to blame, so no alibi
        fleet.cluster._trials._suspicion.died({key: num_tokens}, 0.0, stranger)
