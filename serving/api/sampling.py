"""From the fields of a request body to sampling parameters, checked against the vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from scheduler.types import SamplingParams
from serving.api.schemas import ChatRequest, CompletionRequest
from serving.errors import InvalidRequest
from serving.text.tokenizer import TextCodec

Body = CompletionRequest | ChatRequest


def sampling_params(body: Body, codec: TextCodec) -> SamplingParams:
    """Return what all choices have in common; `max_tokens`, `seed` and `choice` are set later.

    Raises InvalidRequest for values that this vocabulary does not have.
    """
    stop_token_ids = set(body.stop_token_ids or ())
    if not body.ignore_eos:
        stop_token_ids.update(codec.eos_token_ids)
    allowed = sorted(set(body.allowed_token_ids or ()))
    check_ids(allowed, codec, "allowed_token_ids")
    banned = _bad_token_ids(body.bad_words or (), codec)
    if allowed and all((token_id,) in banned for token_id in allowed):
        raise InvalidRequest(
            "bad_words forbids every token of allowed_token_ids: nothing is left", param="bad_words"
        )
    return SamplingParams(
        max_tokens=1,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=min(max(0, body.top_k or 0), codec.vocab_size),
        min_p=_or(body.min_p, 0.0),
        stop_token_ids=tuple(sorted(stop_token_ids)),
        min_tokens=body.min_tokens or 0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias or {}, codec),
        allowed_token_ids=tuple(allowed),
        bad_token_ids=banned,
        logprobs=body.num_logprobs(),
        prompt_logprobs=_num_prompt_logprobs(body),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def check_ids(token_ids: Collection[int], codec: TextCodec, param: str) -> None:
    """Raise InvalidRequest for an id that no token has."""
    # Not one by one: a prompt may have a million.
    known = range(codec.vocab_size)
    for token_id in (max(token_ids, default=0), min(token_ids, default=0)):
        if token_id not in known:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary of {codec.vocab_size}",
                param=param,
            )


def _logit_bias(given: dict[str, float], codec: TextCodec) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in given.items():
        # Ten digits hold every id; int() of many digits is slow, and takes spaces and signs.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias: {key[:20]!r} is not a token id: the keys are numbers as strings",
                param="logit_bias",
            )
        biases[int(key)] = float(bias)
    check_ids(biases, codec, "logit_bias")
    return tuple(sorted(biases.items()))


def _bad_token_ids(words: Iterable[str], codec: TextCodec) -> tuple[tuple[int, ...], ...]:
    """Return the sequences that spell the words, at the start of a text and after a space.

    A spelling that ends in another one is left out: the shorter is banned wherever it comes.
    """
    banned: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            token_ids = tuple(codec.encode(text, add_special_tokens=False))
            if not token_ids:
                raise InvalidRequest(f"bad_words: {word!r} has no tokens", param="bad_words")
            if not any(token_ids[-len(known) :] == known for known in banned):
                banned[token_ids] = None
    return tuple(banned)


def _num_prompt_logprobs(body: Body) -> int | None:
    """Count for the prompt: what was asked for it, and what an echo shows of it."""
    echoed = body.num_logprobs() if isinstance(body, CompletionRequest) and body.echo else None
    wanted = [number for number in (body.prompt_logprobs, echoed) if number is not None]
    return max(wanted, default=None)
