"""The dispatch policies: whom each takes of loads that are told it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from scheduler.cluster.dispatch import (
    DISPATCH_POLICIES,
    Choice,
    Dispatcher,
    dispatch_policy,
    freeness,
    least_loaded,
    power_of_two,
    round_robin,
)
from scheduler.cluster.ledger import InstanceLoad, Ledger
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId
from tests.factories import make_capacity, make_spec

A, B, C = map(InstanceId, "abc")


def load(instance_id, num_requests=0, num_waiting_tokens=0, steps=0.0, places=8):
    return InstanceLoad(instance_id, num_requests, places, num_waiting_tokens, steps)


def choice(*loads, last=None, draw=0):
    return Choice(loads, last, draw)


def test_round_robin_takes_the_next_by_id_and_begins_again_after_the_last():
    loads = (load(B), load(C), load(A))
    went, last = [], None
    for _ in range(5):
        last = round_robin(choice(*loads, last=last))
        went.append(last)
    assert went == [A, B, C, A, B]


def test_round_robin_goes_past_those_that_cannot_and_on_from_one_that_is_gone():
    assert round_robin(choice(load(A), load(C), last=A)) == C
    assert round_robin(choice(load(A), load(C), last=B)) == C
    assert round_robin(choice(load(A), last=A)) == A


def test_least_loaded_takes_the_one_with_the_fewest_requests():
    assert least_loaded(choice(load(A, 3), load(B, 1, 999), load(C, 2))) == B


def test_least_loaded_goes_by_the_share_of_the_places_that_are_taken():
    assert least_loaded(choice(load(A, 3, places=4), load(B, 5, places=8))) == B


def test_of_equally_many_least_loaded_takes_the_one_with_the_least_to_compute():
    assert least_loaded(choice(load(A, 1, 50), load(B, 1, 49))) == B


def test_of_equals_least_loaded_takes_the_first_by_id_in_whatever_order_they_come():
    assert least_loaded(choice(load(B), load(A), load(C))) == A


def test_power_of_two_takes_the_less_loaded_of_the_two_drawn():
    loads = (load(A, 5), load(B, 1), load(C, 3))
    taken = Counter(
        power_of_two(choice(*loads, draw=first | other << 32))
        for first in range(3)
        for other in range(2)
    )
    # Of the six ordered pairs, B is in four and wins, C wins against A, and A wins never.
    assert taken == {B: 4, C: 2}


def test_power_of_two_takes_the_only_one():
    assert power_of_two(choice(load(A, 5), draw=2**63 + 7)) == A


def test_freeness_takes_the_one_whose_memory_lasts_longest():
    assert freeness(choice(load(A, 0, steps=10.0), load(B, 9, steps=11.0))) == B
    assert freeness(choice(load(A, steps=-2.0), load(B, steps=-1.0))) == B


def test_of_equal_freeness_the_fewest_requests_decide_and_then_the_id():
    assert freeness(choice(load(A, 2, steps=1.0), load(B, 1, steps=1.0))) == B
    assert freeness(choice(load(C, steps=1.0), load(B, steps=1.0))) == B


def test_an_instance_that_drains_is_the_last_that_freeness_takes():
    assert freeness(choice(load(A, steps=float("-inf")), load(B, steps=-1e9))) == B


@pytest.mark.parametrize("name", DISPATCH_POLICIES)
def test_every_policy_takes_one_that_it_was_given(name):
    for num in range(1, 6):
        loads = [load(InstanceId(f"i{index}"), index % 2, index % 3) for index in range(num)]
        for draw in range(0, 1 << 64, (1 << 64) // 17):
            taken = dispatch_policy(name)(Choice(loads, InstanceId("i2"), draw))
            assert taken in {one.instance_id for one in loads}


def test_an_unknown_policy_is_an_error_that_lists_the_names():
    words = (
        "no dispatch policy 'best'; there are: round_robin, least_loaded, power_of_two, freeness"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        dispatch_policy("best")


# --- who applies them: what is left to be computed where ---


def sends(*prompts, instances=(A,), **settings):
    """Return where each prompt went, and how many tokens of it were to be computed there."""
    dispatcher = Dispatcher(ClusterConfig(dispatch="least_loaded", **settings))
    ledgers = [Ledger(instance_id, make_capacity(max_num_running=64)) for instance_id in instances]
    went = []
    for number, prompt in enumerate(prompts):
        ledger, num_tokens = dispatcher.choose(make_spec(prompt=prompt), ledgers)
        ledger.send(f"r{number}", 0, num_tokens)
        went.append((ledger.instance_id, num_tokens))
    return went


def test_of_a_prompt_counts_what_is_probably_not_cached_where_it_goes():
    """Of the next chunk, which is not known to be there, all but one token may be."""
    assert sends(range(200), range(400), range(900, 903)) == [(A, 200), (A, 400 - 192 - 63), (A, 3)]


def test_a_prompt_that_is_cached_counts_as_one_token():
    assert sends(range(200), range(200))[1] == (A, 1)


def test_all_of_a_prompt_counts_where_it_was_not_sent():
    went = sends(range(200), range(200), instances=(A, B), prefix_affinity=False)
    assert went == [(A, 200), (B, 200)]


def test_all_of_a_prompt_counts_if_instances_cache_nothing():
    assert sends(range(200), range(200), prefix_caching=False)[1] == (A, 200)
