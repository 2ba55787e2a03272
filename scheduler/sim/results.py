"""What a simulated client would have measured. Facts of each request; statistics are for others."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.types import (
    FinishedEvent,
    FinishReason,
    RejectedEvent,
    RejectReason,
    RequestEvent,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)


@dataclass(slots=True)
class RequestRecord:
    """One request, in seconds of virtual time."""

    spec: RequestSpec
    arrival_s: float
    queue_s: float | None = None
    num_cached_tokens: int = 0
    token_at_s: list[float] = field(default_factory=list)
    ended_at_s: float | None = None
    outcome: FinishReason | RejectReason | None = None
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        return self.token_at_s[0] - self.arrival_s if self.token_at_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if len(self.token_at_s) < 2:
            return None
        return (self.token_at_s[-1] - self.token_at_s[0]) / (len(self.token_at_s) - 1)


class Results:
    """One record for each request that arrived, in order of arrival."""

    def __init__(self) -> None:
        self.records: dict[RequestId, RequestRecord] = {}
        self.num_steps = 0
        self.end_s = 0.0

    def arrived(self, spec: RequestSpec, at_s: float) -> None:
        self.records[spec.request_id] = RequestRecord(spec, at_s)

    def happened(self, event: RequestEvent, at_s: float) -> None:
        record = self.records[event.request_id]
        match event:
            case StartedEvent():
                record.queue_s = event.queue_s
                record.num_cached_tokens = event.num_cached_tokens
            case TokenEvent():
                record.token_at_s.append(at_s)
            case FinishedEvent():
                record.ended_at_s = at_s
                record.outcome = event.reason
                record.num_preemptions = event.num_preemptions
            case RejectedEvent():
                record.ended_at_s = at_s
                record.outcome = event.reason
