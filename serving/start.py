"""From flags to a running server: checks them, finds the model, prints the ready block."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.messages import Ready
from engine.profile import Profile
from engine.startup import StartupTimes
from scheduler.types import InstanceId
from serving.admission import AdmissionLimits
from serving.cluster.hosts.child import Child
from serving.cluster_file import MAX_COUNT, ClusterFile
from serving.config import ServeConfig, ServeFlags, parse_bytes
from serving.errors import UserError
from serving.instances import check_cluster_flags, instance_specs, read_cluster
from serving.listener import ADMIN_HOST, bind
from serving.logs import configure
from serving.ports import Port, admin_rules, api_rules
from serving.progress import LoggedProgress, Progress, TerminalProgress

if TYPE_CHECKING:
    from serving.cluster.ray.session import RaySession

FAKE_MODEL_NAME = "fake"
_SHARE_OF_SEVERAL = 0.5


def run_server(model: str | None, flags: ServeFlags, *, started_at_s: float) -> None:
    """Serve until a signal; exits with 1 if requests had to be cut off.

    `started_at_s` is when the process began, on the clock of time.perf_counter. Raises UserError
    for what the user can mend.
    """
    check_flags(flags)
    configure(as_json=flags.log_json, level=flags.log_level)
    rules = api_rules(flags, os.environ)
    for_operators = admin_rules(flags, os.environ, rules)
    cluster, model = read_cluster(flags, model)
    shown = LoggedProgress() if flags.log_json else TerminalProgress()
    api, admin = Port(bind(flags.host, flags.port), rules), None
    if flags.admin_port is not None:
        admin = Port(bind(ADMIN_HOST, flags.admin_port), for_operators)
    # What instances run in has the longer way to go: it sets out first, and imports what it needs
    # while this process looks for the model and imports what serves HTTP.
    begun: AbstractContextManager[Child | RaySession]
    begun = _ray_session(flags) if flags.uses_ray else Child()
    with begun as origin, shown as progress:
        times = StartupTimes(progress)
        name, folder = FAKE_MODEL_NAME, None
        if not flags.fake:
            with times.phase("model", "finding the model"):
                name, folder = _find_model(model, progress)
        config = replace(
            make_config(
                flags,
                name,
                folder,
                port=api.listener.getsockname()[1],
                num_tenants=1 if rules.keys is None else rules.keys.keys.num_tenants,
                cluster=cluster,
            ),
            admin_port=None if admin is None else admin.listener.getsockname()[1],
            num_keys=0 if rules.keys is None else len(rules.keys.keys.entries),
        )
        if isinstance(origin, Child):
            origin.begin(config.engine)
        with times.phase("server", "importing"):
            from serving.api.service import Service
            from serving.cluster.backend import backend_of
            from serving.http_connection import check_file_limit
            from serving.ready import ready_block
            from serving.server import serve
        check_file_limit(config.admission.max_num_streams)
        backend = backend_of(config, origin, progress, times)

        def on_ready(service: Service, readies: Mapping[InstanceId, Ready]) -> None:
            seconds = service.ready.startup_s | times.seconds
            seconds["total"] = time.perf_counter() - started_at_s
            service.metrics.started_up(seconds)
            progress.close()
            print(ready_block(config, readies, seconds, backend.facts()), flush=True)  # noqa: T201

        clean = asyncio.run(serve(config, api, admin, backend, progress, on_ready))
    if not clean:
        sys.exit(1)


@contextlib.contextmanager
def _ray_session(flags: ServeFlags) -> Iterator[RaySession]:
    """Begin a session; who serves by it ends it, unless it does not come to that."""
    from serving.cluster.ray.session import RaySession

    session = RaySession(flags.ray_address, host=flags.host)
    session.begin()
    try:
        yield session
    except BaseException:
        asyncio.run(session.stop())
        raise


def check_flags(flags: ServeFlags) -> None:
    """Raise UserError for values that cannot work, before anything slow happens."""
    check_cluster_flags(flags)
    for name in (
        *("max_num_running", "max_num_batched_tokens", "max_model_len", "threads"),
        *("max_num_waiting_tokens", "max_num_streams"),
    ):
        value = getattr(flags, name)
        if value is not None and not 1 <= value <= MAX_COUNT:
            size = "small" if value < 1 else "large"
            raise UserError(
                f"{_flag(name)} {value} is too {size}",
                f"it must be at least 1, at most {MAX_COUNT}",
            )
    if flags.max_num_batched_tokens < flags.max_num_running:
        raise UserError(
            f"--max-num-batched-tokens {flags.max_num_batched_tokens} is less than "
            f"--max-num-running {flags.max_num_running}, and each computes a token in every step",
            "raise the first or lower the second",
        )
    for name in (
        *("max_num_waiting", "drain_timeout", "max_queue_age", "priority_headroom"),
        "max_step_ms",
    ):
        value = getattr(flags, name)
        if not value >= 0:  # so that NaN is refused too
            raise UserError(f"{_flag(name)} {value} makes no sense", "it must be 0 or more")
    _check_patience(flags)
    if flags.served_model_name == "":
        raise UserError("--served-model-name is empty", "give a name, or leave it out")
    for name in ("port", "admin_port"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value <= 65535:
            raise UserError(f"{_flag(name)} {value} is not a port", "choose 0 to 65535")


def _check_patience(flags: ServeFlags) -> None:
    if not 0 < flags.watchdog_timeout < math.inf:
        raise UserError(
            f"--watchdog-timeout {flags.watchdog_timeout} makes no sense",
            "give the seconds that the longest step may take, and some more",
        )
    for name in ("sse_keep_alive", "slow_client_timeout"):
        value = getattr(flags, name)
        if not value > 0:
            raise UserError(f"{_flag(name)} {value} makes no sense", "it must be more than 0")
    if flags.tenant_share is not None and not 0 < flags.tenant_share <= 1:
        raise UserError(
            f"--tenant-share {flags.tenant_share} is no share", "it must be more than 0, at most 1"
        )


def make_config(
    flags: ServeFlags,
    name: str,
    folder: Path | None,
    *,
    port: int,
    num_tenants: int = 1,
    cluster: ClusterFile | None = None,
) -> ServeConfig:
    """Return what the flags and the cluster file mean. Raises UserError, as for a strange size."""
    try:
        kv_memory_bytes = None if flags.kv_memory is None else parse_bytes(flags.kv_memory)
    except ValueError as error:
        raise UserError(f"--kv-memory: {error}", "write a number and a unit") from error
    engine = EngineConfig(
        model_name=flags.served_model_name or name,
        model_folder=folder,
        dtype=flags.dtype,
        device=flags.device,
        num_threads=flags.threads,
        kv_memory_bytes=kv_memory_bytes,
        max_model_len=flags.max_model_len,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        max_step_s=flags.max_step_ms / 1000 or None,
        profile=_read_profile(flags.step_costs),
        max_num_running=flags.max_num_running,
        max_num_waiting=flags.max_num_waiting,
        depth=flags.depth,
        policy=flags.scheduling_policy,
        prefix_caching=flags.prefix_caching,
        batch_invariant=flags.batch_invariant,
        decision_log=flags.decision_log,
        fake_step_s=flags.fake_step,
    )
    instances = instance_specs(flags, cluster, engine)
    config = ServeConfig(
        engine=instances[0].engine,
        instances=instances,
        ray_address=flags.ray_address,
        dispatch=flags.dispatch,
        priority_headroom_tokens=flags.priority_headroom,
        prefix_affinity=flags.prefix_affinity,
        continuation_timeout_s=flags.continuation_timeout,
        host=flags.host,
        port=port,
        drain_timeout_s=flags.drain_timeout,
        watchdog_timeout_s=flags.watchdog_timeout,
        sse_keep_alive_s=flags.sse_keep_alive,
        slow_client_timeout_s=flags.slow_client_timeout,
        admission=_admission_limits(flags, num_tenants),
        max_num_streams=flags.max_num_streams,
    )
    return replace(config, admission=config.admission_of(range(config.num_instances)))


def _read_profile(path: Path | None) -> Profile | None:
    if path is None:
        return None
    try:
        return Profile.read(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--step-costs {path} cannot be read: {error}",
            "name a file that `hocket profile` wrote with this version",
        ) from error


def _admission_limits(flags: ServeFlags, num_tenants: int) -> AdmissionLimits:
    """Return the bounds that do not depend on the number of instances."""
    share = flags.tenant_share
    if share is None:  # whoever is not alone leaves room for others
        share = 1.0 if num_tenants == 1 else _SHARE_OF_SEVERAL
    return AdmissionLimits(
        max_num_waiting=flags.max_num_waiting,
        max_num_waiting_tokens=flags.max_num_waiting_tokens,
        max_queue_age_s=flags.max_queue_age or math.inf,
        tenant_share=share,
    )


def _find_model(model: str | None, progress: Progress) -> tuple[str, Path]:
    from serving.store.local import resolve

    stored = resolve(model, progress)
    return stored.name, stored.path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
