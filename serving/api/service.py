"""What the routes work with: one served model, and how a request body becomes token streams."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from typing import Any

from engine.messages import Ready
from scheduler.types import MAX_SEED, RequestId, RequestSpec, SamplingParams
from serving.admission import Admission
from serving.api.gate import Pass
from serving.api.known_fields import AnyBody, UnknownFields, unsupported_field
from serving.api.open_answer import OpenAnswer
from serving.api.request_id import TakenIds
from serving.api.sampling import Body
from serving.api.schemas import ChatRequest
from serving.api.version import VERSION
from serving.api.watch import Watch
from serving.cluster.driver import ClusterDriver
from serving.cluster.streams import StreamGroup
from serving.config import ServeConfig
from serving.errors import ContextTooLong, InvalidRequest, NotFound
from serving.metrics import Metrics
from serving.telemetry.table import Endpoint
from serving.text.chat import ChatTemplate
from serving.text.detokenizer import Shown
from serving.text.tokenizer import TextCodec


@dataclass(frozen=True, kw_only=True)
class Service:
    """One model behind the API."""

    config: ServeConfig
    ready: Ready
    codec: TextCodec
    template: ChatTemplate | None
    driver: ClusterDriver
    metrics: Metrics
    started_at: int  # Unix seconds, for `created` of the model card
    admission: Admission = field(default_factory=Admission)
    watch: Watch = field(default_factory=Watch)
    boot_secret: bytes = field(default_factory=partial(secrets.token_bytes, 32), repr=False)

    @cached_property
    def unknown_fields(self) -> UnknownFields:
        return UnknownFields(self.metrics)

    @property
    def model_name(self) -> str:
        return self.ready.model_name

    def check(self, body: Body) -> None:
        """Raise RequestError for what can be refused without looking at the prompt."""
        self.check_names(body)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if body.best_of not in (None, 1, body.n):
            raise InvalidRequest(
                "best_of must be 1 or n: this server does not choose among more answers",
                param="best_of",
                code="unsupported_parameter",
            )
        if (body.n or 1) > self.config.max_num_choices:
            raise InvalidRequest(f"n must be at most {self.config.max_num_choices}", param="n")
        if body.priority and self.config.engine.policy == "fcfs":
            raise InvalidRequest(
                "priority has no effect on this server: it serves first come, first served; start "
                "it with --scheduling-policy priority",
                param="priority",
            )
        if isinstance(body, ChatRequest):
            if body.top_logprobs and not body.logprobs:
                raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        elif body.max_tokens == 0 and not body.echo:
            raise InvalidRequest(
                "max_tokens must be at least 1, or 0 with echo: true", param="max_tokens"
            )

    def check_names(self, body: AnyBody) -> None:
        """Judge the model's name and the fields that are in no schema. Raises RequestError."""
        if body.model is not None and body.model != self.model_name:
            raise NotFound(
                f"The model {body.model[:200]!r} does not exist; "
                f"this server has: {self.model_name}",
                param="model",
            )
        name = unsupported_field(body)
        if name is not None:
            raise InvalidRequest(
                f"{name} is not supported by this server", param=name, code="unsupported_parameter"
            )
        self.unknown_fields.take(body)

    def head(self, answer_id: str, kind: str) -> dict[str, Any]:
        """Return what every answer and every chunk of it begins with."""
        return {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),  # noqa: TID251 (the API's field is wall-clock time)
            "model": self.model_name,
            "system_fingerprint": self.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another text: other weights, types or code."""
        config = self.config.engine
        parts = (VERSION, self.model_name, self.ready.dtype, self.ready.device)
        return "fp_" + sha256(repr((parts, config.batch_invariant)).encode()).hexdigest()[:12]

    def generate(
        self,
        body: Body,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        ids: TakenIds,
        entry: Pass,
        param: str,
        default_max_tokens: int | None,
    ) -> StreamGroup:
        """Start n choices for each prompt, in order; `param` names the prompts in errors."""
        asked = body.asked_max_tokens()
        max_tokens = default_max_tokens if asked is None else max(asked, 1)
        salt = cache_salt(self.boot_secret, entry.tenant, body.cache_salt or "")
        specs: list[RequestSpec] = []
        for token_ids in prompts:
            room = self._room(token_ids, param)
            limit = min(max_tokens or room, room)
            if params.min_tokens > (limit if asked != 0 else 0):
                raise InvalidRequest(
                    f"min_tokens must be at most max_tokens, and at most {limit} tokens can follow "
                    "here",
                    param="min_tokens",
                )
            for choice in range(body.n or 1):
                specs.append(
                    RequestSpec(
                        request_id=RequestId(f"{ids.internal}-{len(specs)}"),
                        prompt_token_ids=tuple(token_ids),
                        params=replace(params, max_tokens=limit, seed=_seed(body), choice=choice),
                        tenant=entry.tenant,
                        cache_salt=salt,
                        priority=body.priority or 0,
                    )
                )
        shown = Shown(
            stop=bool(body.include_stop_str_in_output),
            special_tokens=body.skip_special_tokens is False,
            nothing=body.echoes_only(),
        )
        entry.correct({spec.request_id: len(spec.prompt_token_ids) for spec in specs})
        return self.driver.submit(
            specs,
            body.stops(),
            shown,
            entry,
            arrived_at_s=ids.arrived_at_s,
            endpoint=Endpoint.CHAT if isinstance(body, ChatRequest) else Endpoint.COMPLETIONS,
        )

    def open_answer(self, group: StreamGroup, entry: Pass, deadline_s: float) -> OpenAnswer:
        """Return what looks after the answer to these streams until it is complete."""
        return OpenAnswer(
            self.driver,
            group,
            entry,
            watch=self.watch,
            deadline_s=deadline_s,
            keep_alive_s=self.config.sse_keep_alive_s,
            slow_client_timeout_s=self.config.slow_client_timeout_s,
        )

    def _room(self, token_ids: Sequence[int], param: str) -> int:
        """Return how many tokens may follow the prompt. Raises InvalidRequest."""
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param=param)
        room = self.ready.max_model_len - len(token_ids)
        if room < 1:
            raise ContextTooLong(len(token_ids), self.ready.max_model_len, param)
        return room


@lru_cache(maxsize=256)
def cache_salt(boot_secret: bytes, tenant: str, given: str) -> str:
    """Return the salt of a request's cached prefixes, which nobody outside can choose or guess.

    A tenant's requests share prefixes if they give the same salt, and never with another tenant's.
    """
    # A tenant's name has no zero byte, so no two pairs read the same.
    return hmac.digest(boot_secret, f"{tenant}\0{given}".encode(), "sha256").hex()


def _seed(body: Body) -> int:
    """Return the seed; an unseeded request gets one here, so that it can be replayed anywhere."""
    return secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
