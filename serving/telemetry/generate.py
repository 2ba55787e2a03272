"""`python -m serving.telemetry.generate`: writes what is made of the table and kept in git."""

from __future__ import annotations

import json
from pathlib import Path

from serving.telemetry.grafana import dashboard
from serving.telemetry.panels import BOARDS
from serving.telemetry.reference import reference

_ROOT = Path(__file__).parents[2]


def generated() -> dict[str, str]:
    """Return the content of each file, by its path in the repository."""
    files = {"docs/metrics.md": reference()}
    for board in BOARDS:
        text = json.dumps(dashboard(board), indent=1) + "\n"
        files[f"deploy/dashboards/{board.name}.json"] = text
    return files


def main() -> None:
    for name, text in generated().items():
        (_ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
