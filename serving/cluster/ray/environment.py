"""What Ray is told by its environment, before it is imported. It imports no ray."""

from __future__ import annotations

import os

_FOR_EVER = "604800"  # seconds: a week
OF_OUR_SESSION = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # No worker before it is asked for: each is 80 MB.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Else 15: whatever else runs would hold the steps of an instance up, our own router first.
    "RAY_worker_niceness": "0",
    # What it would kill are instances, whose memory is bounded; the kernel has the last word.
    "RAY_memory_monitor_refresh_ms": "0",
    # Else all workers end a minute after the head, and a second after the raylet.
    "RAY_gcs_rpc_server_reconnect_timeout_s": _FOR_EVER,
    "RAY_raylet_death_check_interval_milliseconds": f"{_FOR_EVER}000",
}


def forget_other_clusters() -> None:
    """What the user's environment says to Ray is about another cluster."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
