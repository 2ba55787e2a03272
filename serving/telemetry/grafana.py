"""Dashboards as Grafana's JSON model (schema 39, read by Grafana 10 and later). Layout only."""

from __future__ import annotations

from typing import Any

from serving.telemetry.panels import Board, Panel, Query

_SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
_GRID_COLUMNS = 24
_SIZES = {"stat": (4, 4), "timeseries": (8, 8)}  # width, height in cells of the grid


def dashboard(board: Board) -> dict[str, Any]:
    """Return the JSON model; rows below each other, panels from left to right in them."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in board.rows:
        panels.append(_row(len(panels) + 1, title, y))
        y += 1
        x = height = 0
        for panel in row:
            width, panel_height = _SIZES[panel.form]
            if x + width > _GRID_COLUMNS:
                x, y, height = 0, y + height, 0
            grid = {"x": x, "y": y, "w": width, "h": panel_height}
            panels.append(_panel(len(panels) + 1, panel, grid))
            x, height = x + width, max(height, panel_height)
        y += height
    return {
        "uid": f"hocket-{board.name}",
        "title": board.title,
        "tags": ["hocket"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_source_variable(), _model_variable()]},
        "panels": panels,
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": y, "w": _GRID_COLUMNS, "h": 1},
        "panels": [],
    }


def _panel(number: int, panel: Panel, grid: dict[str, int]) -> dict[str, Any]:
    targets = [_target(chr(ord("A") + at), query) for at, query in enumerate(panel.queries)]
    options: dict[str, Any]
    if panel.form == "stat":
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
            "textMode": "auto",
        }
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        }
    return {
        "id": number,
        "type": panel.form,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": grid,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": options,
    }


def _target(ref: str, query: Query) -> dict[str, Any]:
    return {
        "refId": ref,
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "editorMode": "code",
        "range": True,
    }


def _source_variable() -> dict[str, Any]:
    return {
        "name": "DS_PROMETHEUS",
        "label": "Source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "options": [],
        "refresh": 1,
        "regex": "",
    }


def _model_variable() -> dict[str, Any]:
    query = "label_values(hocket_instance_up, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "model"},
        "current": {"text": "All", "value": "$__all"},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "hide": 0,
        "options": [],
        "refresh": 2,
        "regex": "",
        "sort": 1,
    }
