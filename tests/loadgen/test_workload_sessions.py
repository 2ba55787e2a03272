"""Sessions, tenants and shared prefixes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loadgen.types import LoadError
from loadgen.workload.corpus import default_text
from loadgen.workload.lengths import parse_lengths
from loadgen.workload.prefixes import SharedPrefixes
from loadgen.workload.sessions import (
    Shape,
    Think,
    TurnSize,
    fit_turns,
    parse_think,
    write_sessions,
)
from loadgen.workload.tenants import Flood, Tenant, assign, flood_times, parse_tenants
from loadgen.workload.text import Counted, PromptMaker
from loadgen.workload.tokenizer import ByteTokenizer


def stream(aspect):
    return np.random.default_rng([1, *aspect.encode()])


def shape(turns="1", think="0", prompt="100", next_prompt="uniform:5-9", output="uniform:20-30"):
    return Shape(
        prompt=parse_lengths(prompt),
        output=parse_lengths(output),
        turns=parse_lengths(turns),
        next_prompt=parse_lengths(next_prompt),
        think=parse_think(think),
    )


def test_a_session_of_one_turn_starts_without_thinking():
    sizes = shape(think="9").sample(50, stream)
    assert {len(turns) for turns in sizes} == {1}
    assert {(turns[0].num_prompt_tokens, turns[0].think_s) for turns in sizes} == {(100, 0.0)}
    assert {turns[0].max_tokens for turns in sizes} == set(range(20, 31))


def test_conversations_have_their_turns_lengths_and_pauses():
    sizes = shape("uniform:1-4", "exp:2.0").sample(4000, stream)
    assert Counter(map(len, sizes)).keys() == {1, 2, 3, 4}
    later = [turn for turns in sizes for turn in turns[1:]]
    assert {turns[0].num_prompt_tokens for turns in sizes} == {100}
    assert {turn.num_prompt_tokens for turn in later} == set(range(5, 10))
    pauses = np.array([turn.think_s for turn in later])
    assert pauses.mean() == pytest.approx(2.0, rel=0.06)
    assert pauses.std() == pytest.approx(2.0, rel=0.1)


def test_one_aspect_leaves_the_others_alone():
    one = shape("1").sample(20, stream)
    many = shape("3", "1.5", prompt="uniform:50-90").sample(20, stream)
    assert [turns[0].max_tokens for turns in many] != [turns[0].max_tokens for turns in one]
    slow = shape("3", "exp:9", prompt="uniform:50-90").sample(20, stream)
    assert [[turn[:2] for turn in turns] for turns in slow] == [
        [turn[:2] for turn in turns] for turns in many
    ]
    assert {turn.think_s for turns in many for turn in turns[1:]} == {1.5}


def test_turns_are_shortened_to_the_context_and_counted():
    sizes = [[TurnSize(50, 30), TurnSize(50, 30, 1.0)], [TurnSize(10, 200)]]
    fitted, num_shortened = fit_turns(sizes, 81, num_shared=5)
    assert fitted == [[TurnSize(46, 30), TurnSize(50, 30, 1.0)], [TurnSize(1, 75)]]
    assert num_shortened == 2
    assert fit_turns(sizes, None, num_shared=5) == (sizes, 0)


def test_sessions_are_put_together_in_order():
    def prompt(session, turn, num_tokens):
        return Counted(f"{session}.{turn}", num_tokens)

    sizes = [[TurnSize(3, 4), TurnSize(5, 6, 0.5)], [TurnSize(7, 8)]]
    first, second = write_sessions([0.0, 2.0], [Tenant(), Tenant("a", 1, 2)], sizes, prompt)
    assert [(turn.prompt, turn.num_prompt_tokens) for turn in first.turns] == [
        ("0.0", 3),
        ("0.1", 5),
    ]
    assert [(turn.max_tokens, turn.think_s) for turn in first.turns] == [(4, 0.0), (6, 0.5)]
    assert (first.start_at_s, first.tenant, first.priority) == (0.0, "default", None)
    assert (second.start_at_s, second.tenant, second.priority) == (2.0, "a", 2)


def test_think_times_are_read_or_refused():
    assert parse_think("2.5") == Think(2.5)
    assert parse_think("exp:2.5") == Think(2.5, is_exponential=True)
    for spec in ("", "x", "-1", "nan", "inf", "gamma:2", "exp:"):
        with pytest.raises(LoadError, match="is not a think time"):
            parse_think(spec)


def test_tenants_and_floods_are_read():
    tenants, floods = parse_tenants(["gold:3:1", "free:0.5", "low:1:-2", "flood:free@10+5x20.5"])
    assert tenants == [Tenant("gold", 3.0, 1), Tenant("free", 0.5), Tenant("low", 1.0, -2)]
    assert floods == [Flood("free", 10.0, 5.0, 20.5)]
    assert parse_tenants([]) == ([Tenant("default", 1.0, None)], [])


@pytest.mark.parametrize(
    ("specs", "cause"),
    [
        (["gold"], "'gold' is not a tenant"),
        (["gold:x"], "is not a tenant"),
        (["gold:-1"], "is not a tenant"),
        ([":1"], "is not a tenant"),
        (["gold:1:high"], "is not a tenant"),
        (["flood:gold@1+2"], "is not a tenant"),
        (["gold:1", "gold:2"], "named twice"),
        (["gold:0"], "no weight"),
        (["flood:gold@1+0x5"], "sends nothing"),
        (["flood:gold@1+5x0"], "sends nothing"),
        ([f"flood:gold@1+5x{10**400}"], "more than 10,000,000 requests"),
        ([f"flood:gold@{10**400}+5x1"], "or never"),
        ([f"gold:{10**400}"], "no weight"),
        (["gold:1:99999999999"], "is not a tenant"),
    ],
)
def test_bad_tenants_are_named(specs, cause):
    with pytest.raises(LoadError) as caught:
        parse_tenants(specs)
    assert cause in caught.value.cause


def test_tenants_get_their_share():
    tenants = [Tenant("a", 6), Tenant("b", 3), Tenant("c", 1)]
    counts = Counter(tenant.name for tenant in assign(tenants, stream("x"), 10_000))
    assert counts["a"] == pytest.approx(6000, abs=200)
    assert counts["b"] == pytest.approx(3000, abs=200)
    assert counts["c"] == pytest.approx(1000, abs=150)


def test_a_flood_is_a_constant_rate_in_its_window():
    assert flood_times(Flood("a", 10, 0.5, 4)) == [10.0, 10.25]
    assert len(flood_times(Flood("a", 0, 1.1, 10))) == 11
    times = flood_times(Flood("a", 2, 7, 3))
    assert len(times) == 21
    assert min(times) == 2
    assert max(times) < 9


def test_prompts_share_a_prefix_and_differ_behind_it():
    text = default_text()[:20_000].encode("ascii", "ignore").decode()
    prompts = PromptMaker(text, ByteTokenizer())
    shared = SharedPrefixes(prompts, 3, 200, stream("prefixes"))
    rng = stream("prose")
    made = [shared.make(50 + number, rng) for number in range(300)]
    assert [prompt.num_tokens for prompt in made] == [250 + number for number in range(300)]
    assert [len(prompt.prompt) for prompt in made] == [250 + number for number in range(300)]
    prefixes = Counter(prompt.prompt[:200] for prompt in made)
    assert len(prefixes) == 3
    assert min(prefixes.values()) > 60
    assert len({prompt.prompt[200:216] for prompt in made}) > 295
