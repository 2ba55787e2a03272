"""What a step has to do at least: the bytes that it reads and the operations that it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from engine.models.slices import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one step."""

    num_bytes: int  # weights, keys and values read once
    num_flops: int

    @classmethod
    def of(
        cls,
        config: dict[str, Any],
        shape: ModelShape,
        *,
        batch: int = 1,
        context: int = 0,
        num_tokens: int = 1,
    ) -> Work:
        """Count a step in which each of a batch computes tokens behind a context.

        Products with weights and attention; the rest is next to nothing. The last layer's output
        projection and MLP, and the head, are for sampled rows alone.
        """
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        width = shape.num_heads * shape.head_dim
        projected = hidden * (width + 2 * shape.num_kv_heads * shape.head_dim)
        finished = hidden * (width + 3 * inner)
        head = hidden * shape.vocab_size
        layers = shape.num_layers
        by_token = layers * projected + (layers - 1) * finished
        weights = by_token + finished + head
        # Token i of a chunk sees the context, those before it, and itself.
        keys = batch * sum(range(context + 1, context + num_tokens + 1))
        kept = batch * (context + num_tokens)
        return cls(
            num_bytes=weights * shape.dtype.itemsize + kept * shape.kv_token_bytes,
            num_flops=2 * (batch * num_tokens * by_token + batch * (finished + head))
            + 4 * keys * width * layers,
        )


class Shares(NamedTuple):
    """What else a step does, as shares of what its tokens and its weights take."""

    request: float  # the head and what is for sampled rows, of a token's operations
    visit: float  # of a token's operations
    context_token: float  # its keys and values, of the bytes of the weights

    @classmethod
    def of(cls, config: dict[str, Any], shape: ModelShape) -> Shares:
        one, chunk = Work.of(config, shape), Work.of(config, shape, num_tokens=2)
        behind = Work.of(config, shape, context=1)
        visit = behind.num_flops - one.num_flops
        token = chunk.num_flops - one.num_flops - 2 * visit  # the second token visits two keys
        request = one.num_flops - token - visit
        key_bytes = behind.num_bytes - one.num_bytes
        return cls(request / token, visit / token, key_bytes / (one.num_bytes - key_bytes))
