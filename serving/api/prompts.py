"""From the prompt or the messages of a body to token ids. Takes long for long ones: on a thread.

Every function raises InvalidRequest for what cannot be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serving.api.sampling import Body, check_ids
from serving.api.schemas import ChatPrompt, CompletionRequest
from serving.errors import InvalidRequest
from serving.text.chat import ChatTemplate
from serving.text.tokenizer import TextCodec


class Prompt(NamedTuple):
    token_ids: Sequence[int]
    text: str  # to be echoed; empty if it is not


def chat_ids(
    template: ChatTemplate | None, codec: TextCodec, body: ChatPrompt, *, add_special_tokens: bool
) -> list[int]:
    """Render and tokenize. What a message says is text, control tokens are the template's."""
    for number, message in enumerate(body.messages):
        if message.role == "tool" and not message.tool_call_id:
            where = f"messages.{number}.tool_call_id"
            raise InvalidRequest(f"{where}: a tool message names its call", param=where)
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    try:
        rendered = template.render(
            [message.plain() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False and not continues,
            continue_final_message=continues,
            variables=body.chat_template_kwargs,
        )
    except RecursionError as error:
        raise InvalidRequest("messages: nested too deep", param="messages") from error
    return rendered.encode(codec, add_special_tokens=add_special_tokens)


def completion_prompts(
    body: CompletionRequest,
    codec: TextCodec,
    *,
    max_num_prompts: int,
    max_model_len: int,
    default_max_tokens: int,
) -> list[Prompt]:
    """Tokenize each prompt. Raw text is the model's own language, its special tokens included."""
    given = body.prompts()
    if not 1 <= len(given) <= max_num_prompts:
        raise InvalidRequest(f"prompt must hold 1 to {max_num_prompts} prompts", param="prompt")
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            adds = body.add_special_tokens is not False
            whole = codec.encode(prompt, add_special_tokens=adds)
        else:
            check_ids(prompt, codec, "prompt")
            whole = prompt
        token_ids = truncated(whole, body, max_model_len, default_max_tokens)
        text = ""
        if body.echo:
            untouched = isinstance(prompt, str) and len(token_ids) == len(whole)
            skips = body.skip_special_tokens is not False
            text = (
                str(prompt)
                if untouched
                else codec.decode_long(token_ids, skip_special_tokens=skips)
            )
        prompts.append(Prompt(token_ids, text))
    return prompts


def truncated(
    token_ids: list[int], body: Body, max_model_len: int, default_max_tokens: int = 1
) -> list[int]:
    """Return the last of them, as many as `truncate_prompt_tokens` says.

    -1 is all that leave room for `max_tokens`; one that no prompt could leave is no wish for room,
    and what is left is what the answer gets, as without truncation.
    """
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit > max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be at most {max_model_len}, the model's window",
            param="truncate_prompt_tokens",
        )
    if limit == -1:
        asked = body.asked_max_tokens()
        room = max(1, default_max_tokens if asked is None else asked)
        limit = max_model_len - (room if room < max_model_len else 1)
    return token_ids[len(token_ids) - limit :] if limit < len(token_ids) else token_ids
