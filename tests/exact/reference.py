"""What is right: transformers' answers, and prompts of real prose to ask for them.

Knows nothing of the engine. Attention is transformers' default for these models, SDPA; weights come
from the same folder that the engine reads, nothing from a network.

Shape legend: N prompts, P positions behind each prompt, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from serving.text.tokenizer import load_codec
from tests.exact.teacher import Script

ATTENTION = "sdpa"


def prose(folder: Path, lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Return the first tokens of a help text each, of these lengths, no text used twice."""
    codec = load_codec(folder)
    texts = [text for _, text in sorted(topics.topics.items())]
    random.Random(seed).shuffle(texts)
    token_ids = [codec.encode(text, add_special_tokens=True) for text in texts]
    prompts = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # Long texts are few: the longest prompt chooses first.
        chosen = next(ids for ids in token_ids if len(ids) >= lengths[index])
        token_ids.remove(chosen)
        prompts[index] = tuple(chosen[: lengths[index]])
    return [prompts[index] for index in range(len(lengths))]


class Reference:
    """A causal language model as transformers runs it, one sequence at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        ).eval()

    def greedy(self, prompt: Sequence[int], num_outputs: int) -> tuple[tuple[int, ...], Tensor]:
        """Return the likeliest tokens one after another, and their logits_PV, by the KV cache."""
        return self._steps(prompt, num_outputs, ())

    def stepwise(self, script: Script) -> Tensor:
        """Return logits_PV of the forced positions, token by token with the KV cache."""
        return self._steps(script.prompt, len(script.forced), script.forced)[1]

    @torch.inference_mode()
    def whole(self, script: Script) -> Tensor:
        """Return logits_PV of the forced positions, from one pass over the whole sequence."""
        # The last forced token is predicted, never read.
        token_ids = [*script.prompt, *script.forced[:-1]]
        logits_PV: Tensor = self._forward(token_ids, num_logits=len(script.forced)).logits[0]
        return logits_PV.float()

    @torch.inference_mode()
    def _steps(
        self, prompt: Sequence[int], num_outputs: int, forced: Sequence[int]
    ) -> tuple[tuple[int, ...], Tensor]:
        answer = self._forward(prompt)
        logits, said = [answer.logits[0, -1]], []
        for index in range(num_outputs):
            said.append(forced[index] if forced else int(logits[-1].argmax()))
            if index < num_outputs - 1:
                answer = self._forward(said[-1:], cache=answer.past_key_values)
                logits.append(answer.logits[0, -1])
        return tuple(said), torch.stack(logits).float()

    def _forward(self, token_ids: Sequence[int], num_logits: int = 1, cache: Any = None) -> Any:
        return self._model(
            torch.tensor([list(token_ids)]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
