"""Whole servers with models: SmolLM2 through the API, and a GGUF file named on the command line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serving.servers import running_server
from tests.tiny_gguf import write_tiny_gguf

FRANCE = [{"role": "user", "content": "Name the capital of France."}]
# SmolLM2-135M-Instruct's greedy answer, "The capital of France is Paris." and the end of the turn.
# At each of its tokens the second is at least 0.9 behind, in logprobs: more than rounding to
# bfloat16 moves on any CPU. (Asked "What is", it is 0.1 from answering in French.)
PARIS = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.mark.realmodel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_knows_the_capital_of_france(real_model, dtype):
    with (
        running_server(str(real_model), "--kv-memory", "256MiB", "--dtype", dtype) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(**options):
            return client.chat.completions.create(
                model=server.model,
                messages=FRANCE,
                temperature=0,
                extra_body={"return_token_ids": True},
                **{"max_tokens": 16, **options},
            )

        answer = ask()
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].token_ids == PARIS
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (36, 8)

        pieces = [chunk.choices[0] for chunk in ask(stream=True)]
        assert "".join(piece.delta.content for piece in pieces) == answer.choices[0].message.content
        assert [token for piece in pieces for token in piece.token_ids] == PARIS

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(max_tokens=5), range(8)))
        assert {choice.message.content for a in answers for choice in a.choices} == {
            "The capital of France is"
        }

        sampled = [
            client.completions.create(
                model=server.model, prompt="Once upon a time", max_tokens=16, seed=11, n=2
            )
            for _ in range(2)
        ]
        first, second = ([choice.text for choice in s.choices] for s in sampled)
        assert first == second
        assert first[0] != first[1]


def test_a_gguf_file_is_served(tmp_path):
    write_tiny_gguf(tmp_path / "Tiny.gguf")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = (str(tmp_path / "Tiny.gguf"), "--kv-memory", "1MiB", "--dtype", "float32")
    for start in ("converted", "found in the store"):
        with running_server(*arguments, env=cache) as server:
            assert server.model == "Tiny", start
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                answer = client.completions.create(
                    model="Tiny", prompt="hello", max_tokens=5, extra_body={"ignore_eos": True}
                )
            assert answer.usage.completion_tokens == 5
