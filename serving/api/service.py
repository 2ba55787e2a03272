"""What the routes work with: one served model, and how a request body becomes token streams."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import Ready
from scheduler.types import MAX_SEED, RequestId, RequestSpec, SamplingParams
from serving.api.schemas import ChatRequest, CompletionRequest, unsupported_field
from serving.cluster.driver import ClusterDriver
from serving.cluster.streams import StreamGroup
from serving.config import ServeConfig
from serving.errors import ContextTooLong, InvalidRequest, NotFound, Unavailable
from serving.metrics import Metrics
from serving.text.chat import ChatTemplate
from serving.text.tokenizer import TextCodec

_BODY = CompletionRequest | ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One model behind the API."""

    config: ServeConfig
    ready: Ready
    codec: TextCodec
    template: ChatTemplate | None
    driver: ClusterDriver
    metrics: Metrics
    started_at: int  # Unix seconds, for `created` of the model card

    @property
    def model_name(self) -> str:
        return self.ready.model_name

    def check(self, body: _BODY) -> None:
        """Raise RequestError for what can be refused without looking at the prompt."""
        if body.model is not None and body.model != self.model_name:
            raise NotFound(
                f"The model {body.model!r} does not exist; this server has: {self.model_name}",
                param="model",
            )
        name = unsupported_field(body)
        if name is not None:
            raise InvalidRequest(
                f"{name} is not supported by this server", param=name, code="unsupported_parameter"
            )
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if (body.n or 1) > self.config.max_num_choices:
            raise InvalidRequest(f"n must be at most {self.config.max_num_choices}", param="n")
        if not self.driver.ready:
            code = "draining" if self.driver.draining else "no_instance"
            raise Unavailable("the server is not taking requests now", code=code)

    def generate(
        self,
        body: _BODY,
        prompts: Sequence[Sequence[int]],
        *,
        request_id: str,
        param: str,
        default_max_tokens: int | None,
    ) -> StreamGroup:
        """Start n choices for each prompt, in order; `param` names the prompts in errors."""
        max_tokens = body.max_tokens or default_max_tokens
        if isinstance(body, ChatRequest):
            max_tokens = body.max_completion_tokens or max_tokens
        num_choices = body.n or 1
        specs: list[RequestSpec] = []
        for token_ids in prompts:
            room = self._room(token_ids, param)
            for choice in range(num_choices):
                specs.append(
                    RequestSpec(
                        request_id=RequestId(f"{request_id}-{len(specs)}"),
                        prompt_token_ids=tuple(token_ids),
                        params=self._params(body, choice, min(max_tokens or room, room)),
                    )
                )
        return self.driver.submit(specs, body.stops())

    def _room(self, token_ids: Sequence[int], param: str) -> int:
        """Return how many tokens may follow the prompt. Raises InvalidRequest."""
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param=param)
        if max(token_ids) >= self.codec.vocab_size:
            raise InvalidRequest(
                f"token id {max(token_ids)} is not in the vocabulary of {self.codec.vocab_size}",
                param=param,
            )
        room = self.ready.max_model_len - len(token_ids)
        if room < 1:
            raise ContextTooLong(len(token_ids), self.ready.max_model_len, param)
        return room

    def _params(self, body: _BODY, choice: int, max_tokens: int) -> SamplingParams:
        stop_token_ids = set(body.stop_token_ids or ())
        if not body.ignore_eos:
            stop_token_ids.update(self.codec.eos_token_ids)
        # An unseeded request gets its seed here, so that it can be replayed anywhere.
        seed = body.seed if body.seed is not None else secrets.randbelow(MAX_SEED)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            top_k=min(max(0, body.top_k or 0), self.codec.vocab_size),
            min_p=float(body.min_p or 0.0),
            seed=seed,
            choice=choice,
            stop_token_ids=tuple(sorted(stop_token_ids)),
        )
