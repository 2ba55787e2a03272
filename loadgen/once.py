"""One run from its plan to its `Run`: model, target, progress, Ctrl-C."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from loadgen.progress import hide, show
from loadgen.runner import Progress, play
from loadgen.shown import without_user
from loadgen.target import OpenAITarget, check, served_model
from loadgen.types import LoadError, Plan, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFlags:
    """How requests are sent.

    Parameters
    ----------
    model
        Name of the model; by default the first that the server lists.
    endpoint
        Where to: text completions or chat.
    api_key
        Sent as a bearer token.
    ignore_eos
        Ask for answers of the planned length; not every server knows this field.
    timeout
        Seconds until an answer counts as failed.
    extra
        A JSON object whose fields are added to every request.
    """

    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    api_key: str = ""
    ignore_eos: bool = True
    timeout: float = 600.0
    extra: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one run is made of."""

    name: str
    url: str
    plan: Plan
    seed: int
    concurrency: int | None = None  # a closed loop; None: an open one
    flags: TargetFlags = field(default_factory=TargetFlags)
    extra: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


async def run_once(asked: Asked, stop: asyncio.Event) -> Run:
    """Run it, or until `stop` is set, and show how far it is.

    Raises LoadError if the server cannot be reached.
    """
    url, flags = _base(asked.url), asked.flags
    _check(url, flags)
    check(asked.plan, flags.endpoint)
    model = flags.model or await served_model(url, flags.api_key)
    target = OpenAITarget(
        url=url,
        model=model,
        endpoint=flags.endpoint,
        api_key=flags.api_key,
        timeout_s=flags.timeout,
        ignore_eos=flags.ignore_eos,
        extra=asked.extra,
    )
    progress = Progress(len(asked.plan))
    start_unix_s = time.time()  # noqa: TID251 (when it was, for the reader)
    with _all_descriptors():
        async with target:
            showing = asyncio.create_task(show(progress, asked.name))
            try:
                await play(asked.plan, target, stop, progress, asked.concurrency)
            finally:
                await hide(showing)
    is_open = asked.concurrency is None
    return Run(
        name=asked.name,
        url=without_user(url),
        model=model,
        seed=asked.seed,
        start_unix_s=start_unix_s,
        duration_s=progress.duration_s,
        records=tuple(progress.records),
        interrupted=progress.interrupted,
        num_unsent=sum(len(it.turns) for it in asked.plan) - len(progress.records),
        lags_s=progress.lags_s if is_open else (),
        facts=asked.facts,
    )


def why_nothing_came(run: Run) -> LoadError | None:
    """Return why no request of a run succeeded, None if one did."""
    if any(record.ok for record in run.records):
        return None
    if run.interrupted:
        return LoadError("interrupted before any answer was complete", "let it run for longer")
    first = next(iter(run.records))
    remedies = {
        "refused": "see whether the server still runs, and what its log says",
        "disconnected": "see whether the server still runs, and what its log says",
        "connect_timeout": "send less (--rate), or let the server listen with a longer backlog",
        "no_descriptors": "raise this machine's limit (ulimit -Hn), or send less at a time",
        "unsendable": "mend the plan, --extra or --model, whichever this comes from",
        "bad_answer": "give the address of an OpenAI-compatible server, or another --endpoint",
        "timeout": "send less (--rate), or wait for longer (--timeout)",
        "http_400": "change what is asked for; a server may not know ignore_eos (--no-ignore-eos)",
        "http_401": "give the server's key with --api-key",
        "http_404": "name a model that it serves with --model, or another --endpoint",
        "http_429": "send less: a lower --rate or --concurrency",
    }
    return LoadError(
        f"all {len(run.records)} requests failed, the first with {first.error}: {first.detail}",
        remedies.get(first.error, "see the server's log"),
    )


async def why_it_ended(run: Run) -> LoadError | None:
    """Return what to say of a server that went away in the middle, None if it is still there."""
    last = max(run.records, key=lambda record: record.end_at_s)
    if run.interrupted or last.error not in ("refused", "disconnected"):
        return None
    parts = urlsplit(run.url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError:
        until_s = max(record.end_at_s for record in run.records if record.ok)
        failed = sum(not record.ok for record in run.records)
        return LoadError(
            f"the server went away: its last answer came {until_s:.1f} s into the run, and "
            f"{failed} of {len(run.records)} requests failed",
            "see its log; what it answered before is in the report",
        )
    writer.close()
    return None


@contextmanager
def _all_descriptors() -> Iterator[None]:
    """Let as many connections be open as the hard limit allows, and not what is set by default.

    Only while the run lasts: the servers that a comparison starts are to be alike.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that it is unlimited, and then refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _base(url: str) -> str:
    """Return an address without /v1. Raises LoadError for what is none."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port
        is_address = False
    if not is_address or not url.isprintable() or " " in url:
        raise LoadError(
            f"{without_user(url)!r} is no address", "give one such as http://127.0.0.1:8000"
        )
    return url.rstrip("/").removesuffix("/v1")


def _check(url: str, flags: TargetFlags) -> None:
    """Raise LoadError for what no request could be sent with."""
    if not 0 < flags.timeout < math.inf:
        raise LoadError(f"a timeout of {flags.timeout:g} s is none", "give a number above 0")
    if not (flags.api_key.isascii() and (flags.api_key.isprintable())):
        raise LoadError(
            "the key of --api-key holds a character that no header may",
            "give it as the server has it: in ASCII, without a line end",
        )
    if flags.api_key and without_user(url) != url:
        raise LoadError(
            "the address names a user, and --api-key gives a key: only one of them can be sent",
            "leave one of them out",
        )
