"""From flags to a running server: checks them, finds the model, prints the ready block."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path

from engine.build import StartupTimes
from engine.config import EngineConfig
from serving.admission import AdmissionLimits
from serving.config import ServeConfig, ServeFlags, parse_bytes
from serving.errors import UserError
from serving.progress import TerminalProgress

FAKE_MODEL_NAME = "fake"


def run_server(model: str | None, flags: ServeFlags, *, started_at_s: float) -> None:
    """Serve until a signal; exits with 1 if requests had to be cut off.

    `started_at_s` is when the process began, on the clock of time.perf_counter. Raises UserError
    for what the user can mend.
    """
    check_flags(flags)
    with TerminalProgress() as progress:
        times = StartupTimes(progress)
        with times.phase("import", "importing"):
            from serving.api.service import Service
            from serving.listener import bind
            from serving.server import serve

        listener = bind(flags.host, flags.port)
        name, folder = FAKE_MODEL_NAME, None
        if not flags.fake:
            with times.phase("model", "finding the model"):
                name, folder = _find_model(model, progress)
        config = make_config(flags, name, folder, port=listener.getsockname()[1])

        def on_ready(service: Service) -> None:
            from serving.ready import ready_block

            times.seconds["total"] = time.perf_counter() - started_at_s
            progress.close()
            print(ready_block(config, service.ready, times.seconds), flush=True)  # noqa: T201

        clean = asyncio.run(serve(config, listener, times, on_ready))
    if not clean:
        sys.exit(1)


def check_flags(flags: ServeFlags) -> None:
    """Raise UserError for values that cannot work, before anything slow happens."""
    from serving.listener import is_loopback

    if not is_loopback(flags.host) and not flags.insecure:
        raise UserError(
            f"{flags.host} is not a loopback address, and requests carry no key yet",
            "listen on 127.0.0.1 behind a proxy that authenticates, or add --insecure",
        )
    for name in (
        *("max_num_running", "max_num_batched_tokens", "max_model_len", "threads"),
        *("max_num_waiting_tokens", "max_num_streams"),
    ):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} {value} is too small", "it must be at least 1")
    if flags.max_num_batched_tokens < flags.max_num_running:
        raise UserError(
            f"--max-num-batched-tokens {flags.max_num_batched_tokens} is less than "
            f"--max-num-running {flags.max_num_running}, and each computes a token in every step",
            "raise the first or lower the second",
        )
    for name in ("max_num_waiting", "drain_timeout", "max_queue_age"):
        value = getattr(flags, name)
        if not value >= 0:  # so that NaN is refused too
            raise UserError(f"{_flag(name)} {value} makes no sense", "it must be 0 or more")
    _check_patience(flags)
    if flags.served_model_name == "":
        raise UserError("--served-model-name is empty", "give a name, or leave it out")
    if not 0 <= flags.port <= 65535:
        raise UserError(f"--port {flags.port} is not a port", "choose 0 to 65535")


def _check_patience(flags: ServeFlags) -> None:
    for name in ("sse_keep_alive", "slow_client_timeout"):
        value = getattr(flags, name)
        if not value > 0:
            raise UserError(f"{_flag(name)} {value} makes no sense", "it must be more than 0")
    if not 0 < flags.tenant_share <= 1:
        raise UserError(
            f"--tenant-share {flags.tenant_share} is no share", "it must be more than 0, at most 1"
        )


def make_config(flags: ServeFlags, name: str, folder: Path | None, *, port: int) -> ServeConfig:
    """Return what the flags mean. Raises UserError for a size that cannot be read."""
    try:
        kv_memory_bytes = None if flags.kv_memory is None else parse_bytes(flags.kv_memory)
    except ValueError as error:
        raise UserError(f"--kv-memory: {error}", "write a number and a unit") from error
    return ServeConfig(
        engine=EngineConfig(
            model_name=flags.served_model_name or name,
            model_folder=folder,
            dtype=flags.dtype,
            device=flags.device,
            num_threads=flags.threads,
            kv_memory_bytes=kv_memory_bytes,
            max_model_len=flags.max_model_len,
            max_num_batched_tokens=flags.max_num_batched_tokens,
            max_num_running=flags.max_num_running,
            max_num_waiting=flags.max_num_waiting,
            depth=flags.depth,
            policy=flags.scheduling_policy,
            prefix_caching=flags.prefix_caching,
            batch_invariant=flags.batch_invariant,
            decision_log=flags.decision_log,
        ),
        host=flags.host,
        port=port,
        drain_timeout_s=flags.drain_timeout,
        sse_keep_alive_s=flags.sse_keep_alive,
        slow_client_timeout_s=flags.slow_client_timeout,
        admission=_admission_limits(flags),
        debug_endpoints=flags.debug_endpoints,
    )


def _admission_limits(flags: ServeFlags) -> AdmissionLimits:
    max_num_requests = flags.max_num_running + flags.max_num_waiting
    return AdmissionLimits(
        max_num_running=flags.max_num_running,
        max_num_waiting=flags.max_num_waiting,
        max_num_waiting_tokens=flags.max_num_waiting_tokens,
        max_num_streams=flags.max_num_streams or 2 * max_num_requests,
        max_queue_age_s=flags.max_queue_age or math.inf,
        tenant_share=flags.tenant_share,
    )


def _find_model(model: str | None, progress: TerminalProgress) -> tuple[str, Path]:
    from serving.store.local import resolve

    stored = resolve(model, progress)
    return stored.name, stored.path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
