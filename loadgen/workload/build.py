"""From what a user asked for to a plan: the same spec gives the same plan.

Every aspect (arrivals, each length, tenants, prose) draws from its own randomness, made of the
seed and its name. So two plans whose specs differ in one aspect are equal in all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from loadgen.flags import Whole, WholeOrNone
from loadgen.types import LoadError, Plan, Session
from loadgen.workload.arrivals import start_times
from loadgen.workload.corpus import load_text
from loadgen.workload.lengths import MOST_TOKENS, parse_lengths
from loadgen.workload.plan_file import is_plan, read_plan
from loadgen.workload.prefixes import SharedPrefixes, block_prompt
from loadgen.workload.reuse import lru_reuse, num_distinct_tokens, unbounded_reuse
from loadgen.workload.sessions import (
    Shape,
    Stream,
    TurnSize,
    fit_turns,
    parse_think,
    write_sessions,
)
from loadgen.workload.tenants import Flood, Tenant, assign, flood_times, parse_tenants
from loadgen.workload.text import Counted, IdPrompts, PromptMaker, Prompts, random_ids
from loadgen.workload.tokenizer import load_tokenizer
from loadgen.workload.traces import Slice, Trace, cut_trace, has_blocks, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """All that a plan depends on.

    With a trace, arrivals, lengths and shared prefixes are the trace's, and only floods are drawn
    as without. A trace that is a recorded plan is replayed as it is; the rest is then ignored.

    Parameters
    ----------
    seed
        Of all that is drawn.
    num_sessions
        How many sessions start; nearly all are a single request. Floods come on top.
    duration_s
        Seconds in which sessions start.
    arrivals
        constant, poisson or gamma.
    rate
        Sessions a second.
    cv
        Coefficient of variation of gamma arrivals; above 1 they come in bursts.
    prompt_tokens
        Length of prompts: 128, uniform:16-256, lognormal:200,cv=1.0, lognormal:p50=74,p99=3388,
        file:PATH[,column=NAME], or Llumnix's short, medium, long.
    output_tokens
        Length of answers, in the same words.
    max_context
        Tokens of a turn's own prompt and answer; longer ones are shortened, and counted.
    num_prefixes
        How many shared prefixes there are.
    prefix_tokens
        Length of the shared prefix that stands before each prompt; 0: prompts share nothing.
    turns
        Turns of a conversation, in the words of lengths.
    next_prompt_tokens
        Length of what the user says in later turns; by default as the first.
    think
        Seconds between an answer and the next turn.
    tenants
        NAME:WEIGHT[:PRIORITY] shares the sessions, flood:NAME@START+DURATIONxRATE adds some.
    text
        File of prose to make prompts of; by default Python's manual.
    tokenizer
        Folder of a model, or its tokenizer.json, so that lengths are exact; or: bytes.
    token_ids
        Send prompts as token ids.
    vocab_size
        Draw token ids below this where there is no tokenizer.
    trace
        Azure or BurstGPT CSV, Mooncake JSONL, or a plan that was recorded.
    trace_start_s
        Second of the trace to begin at.
    trace_speed
        0.02 sends fifty times as slowly as the trace.
    trace_divisor
        Divide all lengths by this.
    cache_tokens
        Also tell what an LRU cache of so many tokens would hit of a trace with named blocks.
    """

    seed: Whole = 0
    num_sessions: WholeOrNone = None
    duration_s: float | None = None
    arrivals: str = "poisson"
    rate: float = 1.0
    cv: float = 1.0
    prompt_tokens: str = "256"
    output_tokens: str = "128"
    max_context: WholeOrNone = None
    num_prefixes: Whole = 1
    prefix_tokens: Whole = 0
    turns: str = "1"
    next_prompt_tokens: str | None = None
    think: str = "0"
    tenants: tuple[str, ...] = ()
    text: Path | None = None
    tokenizer: str | None = None
    token_ids: bool = False
    vocab_size: WholeOrNone = None
    trace: Path | None = None
    trace_start_s: float = 0.0
    trace_speed: float = 1.0
    trace_divisor: Whole = 1
    cache_tokens: WholeOrNone = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    plan: Plan
    facts: dict[str, str]  # what a reader of the results has to know about it
    weights: dict[str, float] = field(default_factory=dict)  # of tenants: 1 unless it says so


def build_plan(spec: WorkloadSpec) -> Plan:
    """Return the plan alone. Raises LoadError for a mistake in the spec or in a file it names."""
    return build(spec).plan


def build(spec: WorkloadSpec) -> Workload:
    """Return the plan, and what was done to make it. Raises LoadError as `build_plan` does."""
    if spec.trace is not None and is_plan(spec.trace):
        return Workload(plan=read_plan(spec.trace), facts={"plan": str(spec.trace)})
    _check(spec)
    tenants, floods = parse_tenants(spec.tenants)
    prompts, facts = _prompts(spec)
    if spec.trace is None:
        sessions, num_shortened = _draw(spec, "", _start_times(spec), tenants, prompts)
    else:
        trace = cut_trace(read_trace(spec.trace), _slice(spec))
        sessions, num_shortened = _replay(spec, trace, tenants, prompts), trace.num_shortened
        facts |= _trace_facts(trace, spec.cache_tokens)
    for flood in floods:
        more, more_shortened = _draw(
            spec, flood.name, flood_times(flood), [_flooding(flood, tenants)], prompts
        )
        sessions += more
        num_shortened += more_shortened
    if spec.max_context is not None:
        num_turns = sum(len(session.turns) for session in sessions)
        facts["shortened"] = f"{num_shortened} of {num_turns}, to {spec.max_context} tokens"
    return Workload(
        plan=tuple(sorted(sessions, key=lambda it: it.start_at_s)),
        facts=facts,
        weights={tenant.name: tenant.weight for tenant in tenants},
    )


def _check(spec: WorkloadSpec) -> None:
    if spec.seed < 0:
        raise LoadError(f"{spec.seed} is no seed", "give a whole number from 0")
    if spec.num_sessions is not None and spec.num_sessions < 1:
        raise LoadError("the run would hold no request", "ask for at least one session")
    if spec.prefix_tokens < 0 or spec.num_prefixes < 1:
        raise LoadError("there is no such prefix", "give at least one prefix, of 0 tokens or more")
    if spec.num_prefixes * max(spec.prefix_tokens, 1) > MOST_TOKENS:
        raise LoadError(
            f"the shared prefixes are more than {MOST_TOKENS:,} tokens",
            "give fewer or shorter ones",
        )
    if spec.cache_tokens is not None and spec.cache_tokens < 1:
        raise LoadError(f"a cache of {spec.cache_tokens} tokens holds none", "give at least 1")
    least = spec.prefix_tokens + 2
    if spec.max_context is not None and spec.max_context < least:
        raise LoadError(
            f"a context of {spec.max_context} tokens has no room for a prompt and an answer",
            f"give at least {least}",
        )


def _stream(seed: int, label: str) -> Stream:
    return lambda aspect: np.random.default_rng([seed, *f"{label}/{aspect}".encode()])


def _prompts(spec: WorkloadSpec) -> tuple[Prompts, dict[str, str]]:
    if spec.token_ids and spec.tokenizer is None:
        if spec.vocab_size is None or not 1 <= spec.vocab_size < 1 << 31:
            raise LoadError(
                "token ids need a vocabulary", "name a tokenizer, or give the vocabulary's size"
            )
        return random_ids(spec.vocab_size), {"prompts": f"random ids below {spec.vocab_size}"}
    tokenizer = None if spec.tokenizer is None else load_tokenizer(spec.tokenizer)
    maker = PromptMaker(load_text(spec.text), tokenizer)
    name = "Python's manual" if spec.text is None else str(spec.text)
    facts = {
        "prompts": f"{name}, {maker.corpus.num_tokens} tokens, sha256 {maker.corpus.digest}",
        "tokenizer": spec.tokenizer or "none, so lengths are estimates",
    }
    return IdPrompts(maker.ids) if spec.token_ids else maker, facts


def _start_times(spec: WorkloadSpec) -> list[float]:
    return start_times(
        spec.arrivals,
        _stream(spec.seed, "")("arrivals"),
        rate=spec.rate,
        cv=spec.cv,
        num=spec.num_sessions,
        duration_s=spec.duration_s,
    )


def _draw(
    spec: WorkloadSpec,
    label: str,
    starts_s: Sequence[float],
    tenants: Sequence[Tenant],
    prompts: Prompts,
) -> tuple[list[Session], int]:
    """Draw the sessions that start at `starts_s`; return them, and how many turns were shortened.

    Sessions of another label are drawn independently, but share the same prefixes.
    """
    stream = _stream(spec.seed, label)
    sizes, num_shortened = fit_turns(
        _shape(spec).sample(len(starts_s), stream), spec.max_context, spec.prefix_tokens
    )
    first: Callable[[int, np.random.Generator], Counted] = prompts.make
    if spec.prefix_tokens:
        prefixes_rng = _stream(spec.seed, "")("prefixes")
        first = SharedPrefixes(prompts, spec.num_prefixes, spec.prefix_tokens, prefixes_rng).make
    rng = stream("prose")

    def prompt(_session: int, turn: int, num_tokens: int) -> Counted:
        return prompts.make(num_tokens, rng) if turn else first(num_tokens, rng)

    chosen = assign(tenants, stream("tenants"), len(starts_s))
    return write_sessions(starts_s, chosen, sizes, prompt), num_shortened


def _shape(spec: WorkloadSpec) -> Shape:
    return Shape(
        prompt=parse_lengths(spec.prompt_tokens),
        output=parse_lengths(spec.output_tokens),
        turns=parse_lengths(spec.turns),
        next_prompt=parse_lengths(spec.next_prompt_tokens or spec.prompt_tokens),
        think=parse_think(spec.think),
    )


def _flooding(flood: Flood, tenants: Sequence[Tenant]) -> Tenant:
    """Return the tenant of a flood: the one of that name, which may have a priority, or a new."""
    return next((it for it in tenants if it.name == flood.name), Tenant(flood.name))


def _slice(spec: WorkloadSpec) -> Slice:
    return Slice(
        start_s=spec.trace_start_s,
        duration_s=spec.duration_s,
        num_requests=spec.num_sessions,
        speed=spec.trace_speed,
        divisor=spec.trace_divisor,
        max_context=spec.max_context,
    )


def _replay(
    spec: WorkloadSpec, trace: Trace, tenants: Sequence[Tenant], prompts: Prompts
) -> list[Session]:
    stream = _stream(spec.seed, "")
    rng = stream("prose")

    def prompt(session: int, _turn: int, num_tokens: int) -> Counted:
        request = trace.requests[session]
        if request.block_ids:
            return block_prompt(prompts, request, trace.block_tokens, spec.seed)
        return prompts.make(num_tokens, rng)

    return write_sessions(
        [it.at_s for it in trace.requests],
        assign(tenants, stream("tenants"), len(trace.requests)),
        [[TurnSize(it.num_prompt_tokens, it.num_output_tokens)] for it in trace.requests],
        prompt,
    )


def _trace_facts(trace: Trace, cache_tokens: int | None) -> dict[str, str]:
    facts = {"trace": f"{trace.path}, {len(trace.requests)} requests"}
    if trace.num_failed:
        facts["left out"] = f"{trace.num_failed} requests of the trace that had failed"
    if has_blocks(trace):
        whole = unbounded_reuse(trace.requests, trace.block_tokens)
        facts["reuse"] = (
            f"{whole.token_ratio:.2%} of {whole.num_tokens:,} prompt tokens "
            f"({whole.block_ratio:.2%} of {whole.num_blocks:,} blocks) in a cache that forgets "
            f"nothing, of {num_distinct_tokens(trace):,} tokens"
        )
        if cache_tokens is not None:
            part = lru_reuse(trace.requests, trace.block_tokens, cache_tokens // trace.block_tokens)
            facts["reuse, LRU"] = (
                f"{part.token_ratio:.2%} of the prompt tokens in a cache of {cache_tokens:,} tokens"
            )
    elif cache_tokens is not None:
        raise LoadError(
            f"{trace.path} does not say which prompts are alike",
            "leave --cache-tokens out, or replay a trace with named blocks",
        )
    return facts
