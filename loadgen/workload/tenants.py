"""Who sends: tenants by weight, and tenants that flood the server for a while.

NAME:WEIGHT[:PRIORITY]             a share of the sessions, as its weight is to all weights
flood:NAME@START+DURATIONxRATE     RATE requests a second more, from START s for DURATION s
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.types import LoadError
from loadgen.workload.arrivals import MOST

_REMEDY = "write NAME:WEIGHT, NAME:WEIGHT:PRIORITY or flood:NAME@START+DURATIONxRATE"
_MOST = 1e12  # of a weight, and of seconds until a flood
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_TENANT = re.compile(rf"([^:@]+):{_NUMBER}(?::(-?\d{{1,9}}))?")
_FLOOD = re.compile(rf"flood:([^:@]+)@{_NUMBER}\+{_NUMBER}x{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str = "default"
    weight: float = 1.0
    priority: int | None = None  # None: not sent


@dataclass(frozen=True, slots=True)
class Flood:
    """A burst at a constant rate, beside what the tenant of this name sends anyway, if any."""

    name: str
    start_s: float
    duration_s: float
    rate: float  # per second


def parse_tenants(specs: Sequence[str]) -> tuple[list[Tenant], list[Flood]]:
    """Read specs as the head of this file lists them; without any there is one default tenant.

    Raises LoadError for another form, a name used twice, a weight or rate of zero.
    """
    tenants: list[Tenant] = []
    floods: list[Flood] = []
    for spec in specs:
        if match := _FLOOD.fullmatch(spec):
            floods.append(Flood(match[1], *map(float, match.group(2, 3, 4))))
        elif match := _TENANT.fullmatch(spec):
            priority = None if match[3] is None else int(match[3])
            tenants.append(Tenant(match[1], float(match[2]), priority))
        else:
            raise LoadError(f"{spec!r} is not a tenant", _REMEDY)
    if len({tenant.name for tenant in tenants}) < len(tenants):
        raise LoadError("a tenant is named twice", "give each tenant once, with its weight")
    if any(not 0 < tenant.weight <= _MOST for tenant in tenants):
        raise LoadError("a tenant has no weight", "give a weight above 0, or leave the tenant out")
    if any(flood.rate <= 0 or flood.duration_s <= 0 for flood in floods):
        raise LoadError("a flood sends nothing", "give it a rate and a duration above 0")
    if any(flood.start_s > _MOST or flood.rate * flood.duration_s > MOST for flood in floods):
        raise LoadError(f"a flood sends more than {MOST:,} requests, or never", "ask for less")
    return tenants or [Tenant()], floods


def assign(tenants: Sequence[Tenant], rng: np.random.Generator, num: int) -> list[Tenant]:
    """Draw the tenant of each of `num` sessions, independently, by weight."""
    weights = np.array([tenant.weight for tenant in tenants])
    places = rng.choice(len(tenants), num, p=weights / weights.sum())
    return [tenants[place] for place in places]


def flood_times(flood: Flood) -> list[float]:
    """Return the start times of a flood's requests, its end not included."""
    num = math.ceil(flood.duration_s * flood.rate - 1e-9)  # 1.1 * 10 is a little above 11
    return [flood.start_s + index / flood.rate for index in range(num)]
