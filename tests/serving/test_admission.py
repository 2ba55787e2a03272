"""The bounds of admission, on a clock of the test's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import Admission, AdmissionLimits, Refusal, RefusalReason, Ticket
from serving.api.gate import error_of

LIMITS = AdmissionLimits(
    max_num_running=2,
    max_num_waiting=3,
    max_num_waiting_tokens=100,
    max_num_streams=8,
    max_queue_age_s=10.0,
)
NOTHING = {"num_streams": 0, "num_queued": 0, "num_queued_tokens": 0, "num_running": 0}


def admission(**limits):
    return Admission(replace(LIMITS, **limits))


def enter(at, name, *, tenant="t", num_tokens=1, now=0.0):
    return at.enter(name, tenant, num_tokens, now)


def test_as_many_are_let_in_as_may_run_and_wait():
    at = admission()
    tickets = [enter(at, str(number)) for number in range(5)]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)
    assert enter(at, "x").reason is RefusalReason.REQUESTS
    at.started(tickets[0], "0", 1.0)
    assert enter(at, "x", now=1.0).reason is RefusalReason.REQUESTS, "one that runs still counts"
    at.ended(tickets[0], "0", 2.0)
    assert isinstance(enter(at, "x", now=2.0), Ticket)


def test_choices_and_prompts_count_as_what_they_cost():
    at = admission()
    ticket = enter(at, "a")
    assert at.correct(ticket, {str(number): 10 for number in range(5)}, 0.0) is None
    assert at.state()["server"]["num_queued_tokens"] == 50
    assert isinstance(enter(at, "b"), Refusal)
    at.leave(ticket, 0.0)
    ticket = enter(at, "c")
    refusal = at.correct(ticket, {str(number): 1 for number in range(6)}, 0.0)
    assert refusal.reason is RefusalReason.TOO_MANY
    error = error_of(refusal)
    assert (error.status, error.param) == (400, "n"), "no wait would help"
    assert at.state()["server"] == NOTHING | {"num_streams": 1}, "refused, it is queued no more"
    at.leave(ticket, 0.0)
    assert at.state()["server"] == NOTHING


def test_queued_prompt_tokens_are_bounded_but_one_alone_is_let_in():
    at = admission()
    large = enter(at, "a", num_tokens=5000)
    assert isinstance(large, Ticket), "no wait would make it smaller"
    assert enter(at, "b").reason is RefusalReason.TOKENS
    assert at.correct(large, {"a": 60}, 0.0) is None
    assert enter(at, "b", num_tokens=41).reason is RefusalReason.TOKENS
    assert isinstance(enter(at, "b", num_tokens=40), Ticket)
    at.started(large, "a", 1.0)
    assert isinstance(enter(at, "c", num_tokens=60), Ticket), "a prompt that began is not queued"


def test_streams_are_bounded_even_when_nothing_is_queued():
    at = admission(max_num_streams=2)
    tickets = [enter(at, str(number)) for number in range(2)]
    for number, ticket in enumerate(tickets):
        at.ended(ticket, str(number), 0.0)
    assert enter(at, "x").reason is RefusalReason.STREAMS
    at.leave(tickets[0], 0.0)
    assert isinstance(enter(at, "x"), Ticket)


def test_a_tenant_is_told_429_at_its_share_and_others_go_on():
    at = admission(tenant_share=0.4)
    assert all(isinstance(enter(at, name, tenant="greedy"), Ticket) for name in "abc"), (
        "all that run, and its share of those that queue"
    )
    refusal = enter(at, "x", tenant="greedy")
    assert refusal.is_tenants
    error = error_of(refusal)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert isinstance(enter(at, "d", tenant="modest"), Ticket)
    full = admission()
    [enter(full, name) for name in "abcde"]
    error = error_of(enter(full, "f"))
    assert (error.status, error.code) == (503, "queue_full")


def test_the_wait_is_told_by_how_fast_the_queue_drains():
    at = admission(max_num_waiting=40, max_num_waiting_tokens=10**6, max_num_streams=100)
    tickets = [enter(at, str(number), num_tokens=10) for number in range(42)]
    # Two start in each second, from the first on.
    for number in range(20):
        now = (number + 1) / 2
        at.started(tickets[number], str(number), now)
    unknown = admission(max_num_waiting=0)
    [enter(unknown, name) for name in "ab"]
    for name in ("x", "y", "z"):
        # What was refused of 22 that are queued: 11 s, a quarter more or less.
        refusal = at.enter(name, "t", 10, 10.0)
        assert refusal.reason is RefusalReason.REQUESTS
        assert 0.75 * 11 <= refusal.retry_after_s <= 1.25 * 11
        assert 0.75 <= enter(unknown, name).retry_after_s <= 1.25, "nothing is known"
    first, second = (at.enter(name, "t", 10, 10.0).retry_after_s for name in ("x", "y"))
    assert first != second, "they come back at different times"
    assert first == at.enter("x", "t", 10, 10.0).retry_after_s
    headers = error_of(refusal).headers()
    assert headers["retry-after"] == str(math.ceil(refusal.retry_after_s))
    assert int(headers["retry-after-ms"]) == round(refusal.retry_after_s * 1000)
    assert headers["x-should-retry"] == "true"


def test_seconds_without_a_queue_say_nothing_of_its_rate():
    at = admission(max_num_waiting=9, max_num_streams=100)
    for number in range(10):  # each waits a tenth of a second, then nobody does for nine tenths
        ticket = enter(at, str(number), now=float(number))
        at.started(ticket, str(number), number + 0.1)
        at.leave(ticket, number + 0.1)
    [enter(at, f"q{number}", now=10.0) for number in range(11)]
    wait_s = enter(at, "x", now=10.0).retry_after_s
    assert 0.75 * 1.1 <= wait_s <= 1.25 * 1.25, "ten a second drained it, not one"


def test_whoever_would_wait_too_long_is_told_at_once():
    at = admission(max_num_waiting=100, max_num_streams=200, max_queue_age_s=5.0)
    tickets = [enter(at, str(number)) for number in range(20)]
    for number in range(10):  # one a second; nobody who runs ends
        at.started(tickets[number], str(number), number + 1.0)
    refusal = enter(at, "x", now=10.0)
    assert refusal.reason is RefusalReason.AGE
    for number in range(10):
        at.ended(tickets[number], str(number), 10.0)
    for number in range(10, 16):
        at.leave(tickets[number], 10.0)
    assert isinstance(enter(at, "x", now=10.0), Ticket)


def test_who_floods_the_queue_does_not_make_others_wait_too_long():
    at = admission(
        max_num_waiting=100, max_num_streams=200, max_queue_age_s=20.0, tenant_share=0.25
    )
    greedy = [enter(at, f"g{number}", tenant="greedy") for number in range(25)]
    for number in range(10):  # one a second, all of them the greedy tenant's
        at.started(greedy[number], f"g{number}", number + 1.0)
        at.leave(greedy[number], number + 1.0)
    assert enter(at, "g", tenant="greedy", now=10.0).reason is RefusalReason.AGE
    for number in range(5):
        assert isinstance(enter(at, f"m{number}", tenant="modest", now=10.0), Ticket)


def test_only_those_who_have_not_begun_are_overdue():
    at = admission()
    ticket = enter(at, "a")
    at.correct(ticket, {"a-0": 1, "a-1": 1}, 0.0)
    assert not at.is_overdue(ticket, 9.9)
    assert at.is_overdue(ticket, 10.0)
    at.started(ticket, "a-1", 10.0)
    assert not at.is_overdue(ticket, 99.0)
    at.ended(ticket, "a-1", 99.0)
    assert not at.is_overdue(ticket, 99.0), "nor between one choice and the next"
    patient = admission(max_queue_age_s=math.inf)
    assert not patient.is_overdue(enter(patient, "a"), 1e9)


@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["enter", "correct", "started", "ended", "leave"]),
            st.integers(0, 5),
            st.integers(0, 3),
            st.sampled_from([0.0, 0.3, 1.0, 7.5]),
        ),
        max_size=60,
    )
)
def test_counts_are_those_of_what_is_open_in_any_order(moves):
    at, tickets, now = admission(tenant_share=0.7), {}, 0.0
    for what, key, size, step_s in moves:
        now += step_s
        ticket = tickets.get(key)
        if what == "enter" and ticket is None:
            entered = enter(at, f"r{key}", tenant=f"t{key % 2}", num_tokens=size, now=now)
            if isinstance(entered, Ticket):
                tickets[key] = entered
        elif ticket is not None:
            if what == "correct" and not ticket.running:
                at.correct(ticket, {f"r{key}-{number}": size for number in range(size + 1)}, now)
            elif what == "started":
                at.started(ticket, f"r{key}-{size}", now)
            elif what == "ended":
                at.ended(ticket, f"r{key}-{size}", now)
            elif what == "leave":
                at.leave(tickets.pop(key), now)
        state = at.state()
        for name, shown in [("server", state["server"]), *state["tenants"].items()]:
            own = [t for t in tickets.values() if name in ("server", t.tenant)]
            assert shown == {
                "num_streams": len(own),
                "num_queued": sum(len(t.queued) for t in own),
                "num_queued_tokens": sum(sum(t.queued.values()) for t in own),
                "num_running": sum(len(t.running) for t in own),
            }
            assert shown["num_queued"] + shown["num_running"] <= 5
            assert shown["num_streams"] <= 8
        assert set(state["tenants"]) == {t.tenant for t in tickets.values()}, "or they pile up"


@pytest.mark.parametrize("seconds", [0.0, 0.001, 1e9])
def test_no_wait_is_out_of_what_clients_obey(seconds):
    at = admission(max_num_waiting=8, max_num_streams=20)
    tickets = [enter(at, str(number), now=0.0) for number in range(10)]
    for number in range(9):
        at.started(tickets[number], str(number), seconds + 0.001 * number)
    refusal = enter(at, "x", now=seconds + 0.01)
    headers = error_of(refusal).headers()
    assert 1 <= int(headers["retry-after"]) <= 120
    assert 50 <= int(headers["retry-after-ms"]) <= 120_000
