"""The block that `hocket serve` prints when ready: what it serves, how much fits, what next."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.config import EngineConfig
from engine.messages import Ready
from scheduler.types import InstanceId, KVGeometry
from serving.cluster.members import common_ready
from serving.config import ServeConfig
from serving.listener import ADMIN_HOST, DEFAULT_ADMIN_PORT

TYPICAL_TOKENS = 512  # prompt and answer of a short chat turn

# What a start spends its time on, with the words to show: first the process of the model, then, at
# the same time, the one that serves HTTP.
PHASES = {
    "import": "import",
    "weights": "weights",
    "kv": "KV",
    "warm_up": "warm-up",
    "step_times": "step times",
    "ray": "Ray",
    "model": "model",
    "server": "server",
}


def ready_block(
    config: ServeConfig,
    readies: Mapping[InstanceId, Ready],
    seconds: Mapping[str, float],
    session: Mapping[str, Any] | None = None,
) -> str:
    """Return the block.

    `seconds` holds the phases of the start and its `total`, `session` the facts of what several
    instances run in.
    """
    engine, limits, ready = config.engine, config.admission, common_ready(readies.values())
    url = f"http://{config.host}:{config.port}"
    num_tokens = sum(each.geometry.num_tokens for each in readies.values())
    num_bytes = sum(kv.num_blocks * kv.block_bytes for kv in _geometries(readies))
    body = json.dumps(
        {
            "model": ready.model_name,
            "messages": [{"role": "user", "content": "Name the capital of France."}],
            "temperature": 0,
        }
    )
    phases = ", ".join(
        f"{words} {seconds[name]:.2f}" for name, words in PHASES.items() if name in seconds
    )
    lines = [
        ("Serving", f"{ready.model_name} ({ready.dtype}, {ready.device}) at {url}/v1"),
        *([("Kernels", ready.kernels)] if ready.kernels else []),
        *_instances(config, readies, session),
        (
            "Capacity",
            f"{num_tokens:,} tokens of KV ({num_bytes / (1 << 30):.2f} GiB): about "
            f"{num_tokens // TYPICAL_TOKENS:,} requests of {TYPICAL_TOKENS} tokens",
        ),
        (
            "Limits",
            f"{ready.max_model_len:,} tokens a request, {limits.max_num_running} running, "
            f"{limits.max_num_waiting} waiting, {_step(engine)}, "
            f"body {config.max_body_bytes // 1024:,} KiB",
        ),
        ("Mode", _mode(engine)),
        ("Access", _access(config)),
        ("Started in", f"{seconds['total']:.2f} s ({phases})"),
        ("Metrics", f"{url}/metrics    Health: {url}/health    Ready: {url}/ready"),
        *_next_command(config),
        ("Stop", "Ctrl-C lets running requests end; twice stops at once"),
    ]
    width = max(len(name) for name, _ in lines)
    block = "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)
    key = '-H "Authorization: Bearer $KEY" ' if config.num_keys else ""
    curl = (
        f"curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'"
    )
    return f"\nHocket is ready.\n\n{block}\n\nTry:\n\n  {curl}\n"


def _geometries(readies: Mapping[InstanceId, Ready]) -> list[KVGeometry]:
    return [ready.geometry for ready in readies.values()]


def _instances(
    config: ServeConfig, readies: Mapping[InstanceId, Ready], session: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """Return what there is where, if instances run in a session of Ray."""
    if session is None:
        return []
    kinds = Counter((ready.dtype, ready.device) for ready in readies.values())
    words = ", ".join(f"{count} {dtype} on {device}" for (dtype, device), count in kinds.items())
    where = "its own session" if session["is_local"] else f"the cluster at {session['address']}"
    return [
        ("Instances", f"{words}, dispatched by {config.dispatch}"),
        ("Ray", f"{session['version']}, {where}    Logs: {session['logs']}"),
    ]


def _next_command(config: ServeConfig) -> list[tuple[str, str]]:
    """Return what operators may type next, if there is a port for them."""
    if config.admin_port is None:
        return []
    at = "" if config.admin_port == DEFAULT_ADMIN_PORT else f" --admin {_admin_url(config)}"
    return [("Operate", f"hocket status{at}")]


def _admin_url(config: ServeConfig) -> str:
    return f"http://{ADMIN_HOST}:{config.admin_port}"


def _step(engine: EngineConfig) -> str:
    """Return what bounds a step."""
    tokens = f"{engine.max_num_batched_tokens} tokens a step"
    return tokens if engine.max_step_s is None else f"{tokens} or {1000 * engine.max_step_s:g} ms"


def _mode(engine: EngineConfig) -> str:
    """Return what is switched on, in words."""
    words = [
        f"{engine.policy} scheduling",
        f"prefix caching {'on' if engine.prefix_caching else 'off'}",
        f"{engine.depth} step{'s' if engine.depth > 1 else ''} in flight",
    ]
    return ", ".join(words + ["batch-invariant"] * engine.batch_invariant)


def _access(config: ServeConfig) -> str:
    """Return who may ask, and where operators may."""
    keys = f"{config.num_keys} API key{'s' if config.num_keys > 1 else ''}"
    words = keys if config.num_keys else "no API keys: whoever reaches the port may ask"
    if config.admin_port is None:
        return words
    return f"{words}    Admin: {_admin_url(config)}"
