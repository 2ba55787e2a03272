"""The values that pass between the parts: a plan goes into a run, records come out of it.

All times are seconds. Those ending in `_at_s` count from the start of the run, on one monotonic
clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

Prompt = str | tuple[int, ...]  # text, or token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a session.

    Of a conversation, `prompt` is what the user says next; what was said before, the server's real
    answers included, is put before it when it is sent.
    """

    prompt: Prompt
    num_prompt_tokens: int | None = None  # of `prompt`, if it was counted
    max_tokens: int = 128
    think_s: float = 0.0  # from the end of the answer before, or from the start of the session


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Turns that follow each other; nearly every session has one."""

    start_at_s: float
    turns: tuple[Turn, ...]
    tenant: str = "default"
    priority: int | None = None  # None: not sent


Plan = tuple[Session, ...]  # ascending `start_at_s`; a session's number is its place


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. The clock of its latencies starts when it was *meant* to be sent.

    A request that failed has an `error`, which is one of a few classes: http_429, timeout,
    disconnected, ...; `detail` is what the server said, shortened.
    """

    session: int
    turn: int
    tenant: str
    intended_at_s: float
    sent_at_s: float = 0.0
    end_at_s: float = 0.0
    received_at_s: list[float] = field(default_factory=list)  # of each event that brought text
    stamped_at_s: list[float] = field(default_factory=list)  # when a mock server sent those
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None  # None: the server does not say
    num_output_tokens: int = 0  # what the server counted, else the events that brought text
    finish_reason: str = ""
    text: str = ""
    error: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        """Time to the first token. Raises IndexError if none came."""
        return self.received_at_s[0] - self.intended_at_s

    @property
    def e2e_s(self) -> float:
        """Time to the end of the answer."""
        return self.end_at_s - self.intended_at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None if there is none."""
        if self.num_output_tokens < 2 or len(self.received_at_s) < 2:
            return None
        span_s = self.received_at_s[-1] - self.received_at_s[0]
        return span_s / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """The time between each two events that brought text (inter-token latencies)."""
        times = self.received_at_s
        return [after - before for before, after in pairwise(times)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run produced, and what has to be known to believe it."""

    name: str  # of the endpoint or the setting
    url: str
    model: str
    seed: int
    start_unix_s: float
    duration_s: float  # to the end of the last answer
    records: tuple[Record, ...]
    interrupted: bool = False
    num_unsent: int = 0  # requests of the plan: it was interrupted, or a turn before them failed
    lags_s: tuple[float, ...] = ()  # of each open-loop request: sent, less when it was meant to be
    facts: dict[str, str] = field(default_factory=dict)  # machine, versions, command


class LoadError(Exception):
    """A mistake of the user or of the world: `cause` and `remedy`, a line each."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
