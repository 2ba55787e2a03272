"""When an instance that owes something was quiet for too long, on a clock that the test holds."""

from __future__ import annotations

import pytest

from engine.messages import StepEvents
from scheduler.types import FinishedEvent, FinishReason, RejectedEvent, RejectReason, RequestId
from serving.cluster.hosts.watchdog import Watchdog
from tests.factories import make_scheduler

LIMIT_S = 4.0


class Watched:
    """A watchdog that is asked as often as it wants to be."""

    def __init__(self):
        self.watchdog = Watchdog(LIMIT_S)
        self.answers = True  # at once
        self.num_pings = 0
        self.now = 100.0
        assert self.watchdog.verdict(self.now) is None

    def submit(self, *names):
        for name in names:
            self.watchdog.submitted(RequestId(name), self.now)

    def step(self, finished=(), rejected=()):
        self.watchdog.progressed(
            StepEvents(
                started=[],
                prompt_logprobs=[],
                tokens=[],
                finished=[FinishedEvent(RequestId(n), FinishReason.LENGTH) for n in finished],
                rejected=[RejectedEvent(RequestId(n), RejectReason.NEVER_FITS) for n in rejected],
                view=make_scheduler().view(),
                step_s=0.1,
            ),
            self.now,
        )

    def first_complaint(self, seconds):
        """Let time pass; return after how long something was wrong, and what."""
        start_s = self.now
        while self.now < start_s + seconds:
            self.now += self.watchdog.interval_s
            wrong = self.watchdog.verdict(self.now)
            if wrong is not None:
                return self.now - start_s, wrong
            if self.watchdog.wants_ping(self.now):
                self.num_pings += 1
                if self.answers:
                    self.watchdog.answered(self.now)
        return None


def test_who_owes_nothing_may_be_quiet_but_answers():
    watched = Watched()
    assert watched.first_complaint(10 * LIMIT_S) is None
    watched.submit("a", "b")
    watched.step(finished=["a"], rejected=["b"])
    assert watched.first_complaint(10 * LIMIT_S) is None
    assert watched.num_pings == pytest.approx(40, abs=2), "every half of the limit"


def test_who_owes_nothing_and_does_not_answer_is_not_well():
    watched = Watched()
    watched.answers = False
    after_s, wrong = watched.first_complaint(100)
    assert LIMIT_S <= after_s <= 1.5 * LIMIT_S + 2 * watched.watchdog.interval_s
    assert wrong == "no sign of life for 4 s"
    assert watched.num_pings == 1


def test_a_request_does_not_begin_the_limit_of_an_answer_anew():
    watched = Watched()
    watched.answers = False
    watched.first_complaint(LIMIT_S)
    watched.submit("a")
    after_s, wrong = watched.first_complaint(100)
    assert after_s < LIMIT_S
    assert wrong == "no step for 4 s with 1 request"


def test_an_answer_is_no_step():
    watched = Watched()
    watched.submit("a")
    assert watched.first_complaint(100)
    assert watched.num_pings == 0


@pytest.mark.parametrize("before_s", [0.0, 0.3, 100.0])
def test_who_owes_is_given_the_limit_from_the_first_request(before_s):
    watched = Watched()
    watched.first_complaint(before_s)
    watched.submit("a", "b")
    after_s, wrong = watched.first_complaint(100)
    assert LIMIT_S <= after_s <= LIMIT_S + watched.watchdog.interval_s
    assert wrong == "no step for 4 s with 2 requests"


def test_a_new_request_does_not_hide_that_nothing_moves():
    watched = Watched()
    watched.submit("a")
    watched.first_complaint(LIMIT_S - 1)
    watched.submit("b")
    assert watched.first_complaint(1.5)


def test_each_step_begins_the_limit_anew():
    watched = Watched()
    watched.submit("a")
    for _ in range(5):
        assert watched.first_complaint(LIMIT_S - 1) is None
        watched.step()
    assert watched.first_complaint(LIMIT_S + 1)


@pytest.mark.parametrize("is_idle", [False, True])
def test_our_own_sleep_is_nobodys_fault(is_idle):
    watched = Watched()
    if is_idle:
        watched.answers = False
        while not watched.num_pings:
            assert watched.first_complaint(watched.watchdog.interval_s) is None
    else:
        watched.submit("a")
    assert watched.first_complaint(1) is None
    watched.now += 1000  # stopped by the terminal, or the machine slept
    after_s, _ = watched.first_complaint(100)
    assert LIMIT_S - 1.5 <= after_s <= LIMIT_S
