"""The status of a server as people read it: a head, a table of instances, what is going on."""

from __future__ import annotations

from typing import Any

_COLUMNS = (
    *("INSTANCE", "STATE", "RUNNING", "WAITING", "KV"),
    *("RESTARTS", "INCARNATION", "MODEL", "WHERE"),
)
_NUMBERS = frozenset(("RUNNING", "WAITING", "KV", "RESTARTS", "INCARNATION"))


def table(status: dict[str, Any]) -> str:
    """Return the lines; `status` is what GET /admin/status answers."""
    rows = [_row(instance) for instance in status["instances"]]
    widths = [
        max(len(column), *(len(row[at]) for row in rows)) for at, column in enumerate(_COLUMNS)
    ]
    lines = [_head(status), "", *(_line(row, widths) for row in (_COLUMNS, *rows))]
    change, last = status["change"], status["last_change"]
    if change is not None:
        done = f": {change['lines'][-1]}" if change["lines"] else ""
        lines += ["", f"{change['title']}{done}"]
    elif last is not None and last["error"] is not None:
        lines += ["", f"{last['title']} failed: {last['error']['cause']}"]
    if status["session"] is not None:
        session = status["session"]
        lines += [
            "",
            f"Ray {session['version']} at {session['address']}, logs in {session['logs']}",
        ]
    return "\n".join(lines)


def _head(status: dict[str, Any]) -> str:
    num_up = sum(instance["state"] == "up" for instance in status["instances"])
    words = [
        f"{num_up} of {_counted(status['num_wanted'], 'instance')} up",
        _counted(status["num_requests"], "request"),
        f"{status['num_queued']} queued at the router",
    ]
    words += ["draining: new requests are refused"] * status["is_draining"]
    return f"{status['model']}: {', '.join(words)}"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _row(instance: dict[str, Any]) -> tuple[str, ...]:
    where = [f"pid {instance['pid']}"] * (instance["pid"] is not None)
    where += [f"on {instance['node']}"] * (instance["node"] is not None)
    what = f"{instance['dtype']} on {instance['device']}" if instance["dtype"] else "-"
    return (
        instance["instance"],
        instance["state"],
        str(instance["num_running"]),
        str(instance["num_waiting"]),
        f"{instance['kv_usage']:.0%}",
        str(instance["num_restarts"]),
        str(instance["incarnation"]),
        what,
        " ".join(where) or "-",
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = (
        text.rjust(width) if column in _NUMBERS else text.ljust(width)
        for column, text, width in zip(_COLUMNS, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip()
