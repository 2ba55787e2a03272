"""Log-probabilities in the shapes of OpenAI's API: pure functions from scored tokens to JSON.

A value is shown as the model gave it, so that the chosen token's equals its entry among the
likeliest; minus infinity, which JSON does not have, is shown as -9999, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.types import Logprobs
from serving.cluster.streams import ScoredToken
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import TextCodec

_LOWEST = -9999.0


def score_prompt(
    token_ids: Sequence[int], positions: Sequence[Logprobs], codec: TextCodec
) -> list[ScoredToken]:
    """Return a prompt as scored tokens; the first has no score."""
    detokenizer = Detokenizer(codec)
    scores: list[Logprobs | None] = [None, *positions]
    scores += [None] * (len(token_ids) - len(scores))
    scored, num_chars = [], 0
    for token_id, logprobs in zip(token_ids, scores, strict=True):
        scored.append(ScoredToken(token_id, logprobs, num_chars))
        num_chars += len(detokenizer.push(token_id))
    return scored


def completion_logprobs(
    tokens: Sequence[ScoredToken], num_top: int, codec: TextCodec
) -> dict[str, list[Any]]:
    """Return `choices[].logprobs` of a completion: one entry a token in each of its lists."""
    return {
        "tokens": [_text(token.token_id, codec) for token in tokens],
        "token_logprobs": [
            None if token.logprobs is None else _shown(token.logprobs.chosen) for token in tokens
        ],
        "top_logprobs": [_by_text(token, num_top, codec) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def chat_logprobs(
    tokens: Sequence[ScoredToken], num_top: int, codec: TextCodec
) -> dict[str, list[Any]]:
    """Return `choices[].logprobs` of a chat completion."""
    content = []
    for token in tokens:
        scores = token.logprobs
        top = scores.top[:num_top] if scores is not None else ()
        content.append(
            _chat_entry(token.token_id, None if scores is None else scores.chosen, codec)
            | {"top_logprobs": [_chat_entry(*entry, codec) for entry in top]}
        )
    return {"content": content}


def prompt_logprobs(
    token_ids: Sequence[int], positions: Sequence[Logprobs], num_top: int, codec: TextCodec
) -> list[dict[str, Any] | None]:
    """Return `choices[].prompt_logprobs`: null for the first token, then one object a token."""
    shown: list[dict[str, Any] | None] = [None]
    for chosen_id, scores in zip(token_ids[1:], positions, strict=False):
        entries = {
            str(token_id): {
                "logprob": _shown(logprob),
                "rank": rank,
                "decoded_token": _text(token_id, codec),
            }
            for rank, (token_id, logprob) in enumerate(scores.top, start=1)
            if rank <= num_top or token_id == chosen_id
        }
        if str(chosen_id) not in entries:  # its rank is not known
            entries[str(chosen_id)] = {
                "logprob": _shown(scores.chosen),
                "decoded_token": _text(chosen_id, codec),
            }
        shown.append(entries)
    return shown


def _by_text(token: ScoredToken, num_top: int, codec: TextCodec) -> dict[str, float] | None:
    """Return the likeliest and the chosen one; of tokens with the same text, the likelier."""
    if token.logprobs is None:
        return None
    entries: dict[str, float] = {}
    chosen = (token.token_id, token.logprobs.chosen)
    for token_id, logprob in (*token.logprobs.top[:num_top], chosen):
        text = _text(token_id, codec)
        entries[text] = max(entries.get(text, _LOWEST), _shown(logprob))
    return entries


def _chat_entry(token_id: int, logprob: float | None, codec: TextCodec) -> dict[str, Any]:
    data = codec.token_bytes(token_id)
    return {
        "token": _text(token_id, codec),
        "logprob": None if logprob is None else _shown(logprob),
        "bytes": None if data is None else list(data),
    }


def _text(token_id: int, codec: TextCodec) -> str:
    """Return a token's text; a piece of a character is shown as its bytes."""
    data = codec.token_bytes(token_id)
    if data is None:  # an id that the model has and the tokenizer does not
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _shown(logprob: float) -> float:
    return max(logprob, _LOWEST)
