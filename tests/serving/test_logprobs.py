"""Log-probabilities as clients read them: shapes, echo, streams, stops, broken characters."""

from __future__ import annotations

import asyncio
import math
import threading

import msgspec
import pytest

from scheduler.types import Logprobs
from serving.api import answers
from serving.api.logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    score_prompt,
)
from serving.api.responses import in_pieces
from serving.cluster.streams import ScoredToken
from tests.serving.scripted import CODEC, Server, encode, says, score

A, B = encode("AB")


def ask(path, script, **body):
    async def scenario():
        async with Server(script) as server:
            answer = await (server.chat if path == "chat" else server.complete)(**body)
            assert answer.status == 200, answer.text
            return answer.events() if body.get("stream") else answer.json()

    return asyncio.run(scenario())


def joined(chunks):
    """Put the scores of a streamed completion together again."""
    whole = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name, values in choice["logprobs"].items():
                whole[name] += values
    return whole


# --- completions ---


def test_a_completion_shows_each_tokens_scores():
    answer = ask("completions", says("AB"), logprobs=2)
    a, b = score(A, 2), score(B, 2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["A", "B"],
        "token_logprobs": [a.chosen, b.chosen],
        "top_logprobs": [
            {CODEC.decode([i]): v for i, v in a.top},
            {CODEC.decode([i]): v for i, v in b.top},
        ],
        "text_offset": [0, 1],
    }


def test_with_no_likeliest_the_chosen_one_is_shown():
    answer = ask("completions", says("AB"), logprobs=0)
    scores = answer["choices"][0]["logprobs"]
    assert scores["top_logprobs"] == [
        {"A": scores["token_logprobs"][0]},
        {"B": scores["token_logprobs"][1]},
    ]


def test_without_logprobs_there_are_none():
    assert ask("completions", says("AB"))["choices"][0]["logprobs"] is None
    assert ask("chat", says("AB"))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("as_text", [True, False])
def test_a_harness_for_evaluation_reads_the_prompts_scores(as_text):
    """As lm-eval's local-completions asks: greedy where a token's score is the best one's."""
    text = "Once upon"
    prompt = text if as_text else encode(text)
    answer = ask(
        "completions", says("!"), prompt=prompt, echo=True, max_tokens=1, logprobs=1, temperature=0
    )
    choice = answer["choices"][0]
    assert choice["text"] == text + "!"
    scores = choice["logprobs"]
    assert scores["tokens"] == [*text, "!"]
    assert scores["text_offset"] == list(range(len(text) + 1))
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    ids = encode(text + "!")
    for token, value, top in zip(
        ids[1:], scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True
    ):
        assert value == score(token, 1).chosen
        assert value in top.values()
        assert (value == max(top.values())) == (token % 2 == 0)


def test_an_echo_alone_generates_nothing():
    answer = ask(
        "completions", says("!"), prompt=["Hey", "Yo"], echo=True, max_tokens=0, logprobs=1
    )
    assert [choice["text"] for choice in answer["choices"]] == ["Hey", "Yo"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["choices"][1]["logprobs"]["tokens"] == ["Y", "o"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 0, 5)
    chunks = ask(
        "completions", says("!"), echo=True, max_tokens=0, logprobs=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Once"
    assert joined(chunks)["tokens"] == list("Once")
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 0


def test_an_echo_without_scores_and_with_choices():
    answer = ask("completions", says("!?"), prompt=["Hey", "Yo"], echo=True, n=2)
    assert [c["text"] for c in answer["choices"]] == ["Hey!?", "Hey!?", "Yo!?", "Yo!?"]
    assert all(choice["logprobs"] is None for choice in answer["choices"])


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("stop", [None, "YZ"])
def test_a_streamed_completion_has_the_scores_of_the_whole(echo, stop):
    body = {"logprobs": 3, "echo": echo, "stop": stop, "prompt_logprobs": 1}
    script = says("Hé 🐦 you")
    whole = ask("completions", script, **body)["choices"][0]
    chunks = ask("completions", script, **body, stream=True)
    assert joined(chunks) == whole["logprobs"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [chunk["choices"][0].get("prompt_logprobs") for chunk in chunks] == [
        whole["prompt_logprobs"],
        *[None] * (len(chunks) - 1),
    ]
    for chunk in chunks:
        if stop is None and not echo:
            assert len(chunk["choices"][0]["logprobs"]["tokens"]) <= 1


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_stop_string_cuts_off_has_no_scores(stream):
    answer = ask("completions", says("abcSTdSTOPe"), logprobs=1, stop="STOP", stream=stream)
    if stream:
        scores, text = joined(answer), "".join(c["choices"][0]["text"] for c in answer)
        shown = 0
        for chunk in answer:
            shown += len(chunk["choices"][0]["text"])
            assert all(at < shown for at in chunk["choices"][0]["logprobs"]["text_offset"])
    else:
        scores, text = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
    assert text == "abcSTd"
    assert scores["tokens"] == list("abcSTd")
    assert scores["text_offset"] == list(range(6))


def test_scores_that_waited_for_a_stop_string_in_vain_are_shown():
    answer = ask("completions", says("abST"), logprobs=0, stop="STOP")
    assert answer["choices"][0]["text"] == "abST"
    assert answer["choices"][0]["logprobs"]["tokens"] == list("abST")


# --- chat ---


def test_a_chat_shows_each_tokens_scores():
    choice = ask("chat", says("AB"), logprobs=True, top_logprobs=2)["choices"][0]
    assert choice["message"]["content"] == "AB"
    assert choice["logprobs"]["content"] == [
        {
            "token": text,
            "logprob": score(token, 2).chosen,
            "bytes": [ord(text)],
            "top_logprobs": [
                {"token": chr(i + 32), "logprob": value, "bytes": [i + 32]}
                for i, value in score(token, 2).top
            ],
        }
        for text, token in (("A", A), ("B", B))
    ]


def test_a_streamed_chat_has_scores_in_each_chunk_for_its_tokens():
    chunks = ask("chat", says("A🐦B"), logprobs=True, max_tokens=9, stream=True)
    content = [entry for c in chunks for entry in c["choices"][0]["logprobs"]["content"]]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "A🐦B"
    assert [entry["token"] for entry in content] == [
        "A", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x90", "bytes:\\xa6", "B",
    ]  # fmt: skip
    assert all(entry["top_logprobs"] == [] for entry in content)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_each_choice_has_its_own_scores():
    texts = ["A", "BC"]

    def script(spec):
        return says(texts[spec.params.choice])(spec)

    choices = ask("chat", script, logprobs=True, n=2)["choices"]
    shown = [[entry["token"] for entry in c["logprobs"]["content"]] for c in choices]
    assert shown == [["A"], ["B", "C"]]


# --- prompts ---


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_prompt_scores_are_by_token_id(path):
    choice = ask(path, says("AB"), prompt_logprobs=1)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    prompt = encode("Once") if path == "completions" else None
    for at, entry in enumerate(rest, start=1):
        (best, *chosen) = entry.items()
        assert best[1]["rank"] == 1
        assert best[1]["decoded_token"] == CODEC.decode([int(best[0])])
        if prompt:
            token = prompt[at]
            assert entry[str(token)]["logprob"] == score(token, 1).chosen
            assert len(chosen) == token % 2
    assert len(rest) == 3 if prompt else len(rest) > 10


def test_prompt_scores_know_ranks_beyond_those_that_are_shown():
    scores = Logprobs(-2.0, ((7, -0.5), (8, -1.0), (9, -2.0)))
    assert prompt_logprobs([5, 9], [scores], 1, CODEC)[1] == {
        "7": {"logprob": -0.5, "rank": 1, "decoded_token": "'"},
        "9": {"logprob": -2.0, "rank": 3, "decoded_token": ")"},
    }
    assert prompt_logprobs([5, 4], [Logprobs(-3.0)], 0, CODEC)[1] == {
        "4": {"logprob": -3.0, "decoded_token": "$"}
    }


# --- the shapes alone ---


class SameText:
    """Two ids with the same text, and one that only the model has."""

    def token_bytes(self, token_id):
        return {1: b"x", 2: b"x", 3: b"y"}.get(token_id)


@pytest.mark.parametrize(("chosen_id", "chosen"), [(1, -0.5), (2, -1.5)])
def test_ids_with_the_same_text_never_hide_the_chosen_one(chosen_id, chosen):
    token = ScoredToken(chosen_id, Logprobs(chosen, ((1, -0.5), (2, -1.5), (3, -9.0))), 0)
    shown = completion_logprobs([token], 3, SameText())
    assert shown["token_logprobs"] == [chosen]
    assert shown["top_logprobs"] == [{"x": -0.5, "y": -9.0}]


def test_what_json_cannot_say_is_shown_all_the_same():
    token = ScoredToken(99, Logprobs(-math.inf, ((3, 0.0), (99, -math.inf))), 0)
    shown = completion_logprobs([token], 2, SameText())
    assert shown["top_logprobs"] == [{"y": 0.0, "token_id:99": -9999.0}]
    assert shown["token_logprobs"] == [-9999.0]
    entry = chat_logprobs([token], 0, SameText())["content"][0]
    assert entry == {
        "token": "token_id:99", "logprob": -9999.0, "bytes": None, "top_logprobs": [],
    }  # fmt: skip


def test_a_token_that_the_model_did_not_score_has_no_value():
    token = ScoredToken(3, None, 0)
    assert completion_logprobs([token], 1, CODEC)["top_logprobs"] == [None]
    assert chat_logprobs([token], 1, CODEC)["content"][0]["logprob"] is None


def test_offsets_of_a_prompt_count_characters():
    tokens = score_prompt(encode("é🐦x"), [], CODEC)
    assert [token.text_offset for token in tokens] == [0, 0, 1, 1, 1, 1, 2]
    assert all(token.logprobs is None for token in tokens)


# --- long answers ---


@pytest.mark.parametrize("value", [[], {}, None, {"a": [[1, None], {"b": "é\n"}] * 50, "c": [1]}])
def test_what_is_encoded_in_pieces_is_the_same(value):
    assert bytes(in_pieces(value)) == msgspec.json.encode(value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{}, {"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}])
def test_scores_are_encoded_off_the_event_loop(monkeypatch, stream, asked):
    threads = []

    def noted(original):
        def encode(*args, **kwargs):
            threads.append(threading.current_thread())
            return original(*args, **kwargs)

        return encode

    for name in ("in_pieces", "json_response"):
        monkeypatch.setattr(answers, name, noted(getattr(answers, name)))
    prompt = list(range(52))
    body = {"prompt": prompt, "max_tokens": 1, "stream": stream, **asked}
    given = ask("completions", says("A"), **body)
    choice = (given[0] if stream else given)["choices"][0]
    if "prompt_logprobs" in asked:
        assert len(choice["prompt_logprobs"]) == len(prompt)
    if "echo" in asked:
        assert len(choice["logprobs"]["tokens"]) >= len(prompt)
    is_main = {thread is threading.main_thread() for thread in threads}
    if asked:
        assert is_main == {False}
    else:
        assert is_main <= {True}
