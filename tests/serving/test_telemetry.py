"""The table of metrics, and that what is made of it is current, whole and well formed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from engine.messages import Ready
from scheduler.load import InstanceView, KVCounters, StepSize
from scheduler.types import InstanceId
from serving.cluster.times import RequestMarks
from serving.metrics import Metrics
from serving.telemetry.generate import generated
from serving.telemetry.panels import metrics_of
from serving.telemetry.store import Histogram, MetricStore
from serving.telemetry.table import BY_NAME, TABLE
from tests.factories import make_geometry

ROOT = Path(__file__).parents[2]
BOARDS = ("overview", "engine")


def samples(page, name):
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in page.decode().splitlines()
        if line.startswith(name)
    }


def board(name):
    return json.loads((ROOT / f"deploy/dashboards/{name}.json").read_text())


def view(**changes):
    settings = {
        "num_running": 1, "num_waiting": 0, "num_waiting_tokens": 0, "num_blocks": 10,
        "num_free_blocks": 8, "num_steps": 5, "num_computed_tokens": 50, "num_preemptions": 2,
        "last_step": StepSize(7, 3),
        "kv": KVCounters(num_idle_blocks=2, num_claimed_blocks=1, longest_free_run_blocks=2),
    }  # fmt: skip
    return InstanceView(**settings | changes)


ONE = InstanceId("i0")
READY = Ready("m", "float32", "cpu", 256, make_geometry())
GAUGES_OF_INSTANCES = [
    metric for metric in TABLE if metric.kind == "gauge" and "instance" in metric.labels
]


# --- the table and what is made of it ---


@pytest.mark.parametrize("name", sorted(generated()))
def test_what_is_made_of_the_table_is_current(name):
    assert (ROOT / name).read_text() == generated()[name], (
        "run python -m serving.telemetry.generate"
    )


def test_names_are_as_prometheus_wants_them():
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not {"le", "model", "replica"} & set(metric.labels)
        assert metric.help
        assert metric.fact
        assert set(metric.values) <= set(metric.labels)
        assert not metric.vanishes or (metric.kind == "gauge" and "instance" in metric.labels)


# What vllm/v1/metrics/loggers.py of 0.32 has; a dashboard made for vLLM may name any of them.
VLLM_BOUNDS = {
    "time_to_first_token_seconds": (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
        40, 80, 160, 640, 2560,
    ),
    "inter_token_latency_seconds": (
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
        80,
    ),
    "e2e_request_latency_seconds": (
        0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
        7680,
    ),
    "request_params_n": (1, 2, 5, 10, 20),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(VLLM_BOUNDS))
def test_buckets_are_vllms_and_more(name):
    (metric,) = [metric for metric in TABLE if metric.vllm and metric.vllm.name == name]
    assert set(VLLM_BOUNDS[name]) <= set(metric.buckets)


def test_small_models_are_told_apart_by_the_buckets():
    """No bucket is so wide that a quantile in it may be off by more than half."""
    for name, low, high in (
        ("time_to_first_token_seconds", 0.25, 5),
        ("inter_token_latency_seconds", 0.01, 0.025),
        ("e2e_latency_seconds", 0.2, 10),
    ):
        bounds = [bound for bound in BY_NAME[name].buckets if low <= bound <= high]
        assert all(after <= 2 * before for before, after in pairwise(bounds)), name


def test_dashboards_use_the_metrics_that_are_meant_for_them_and_no_others():
    for name in BOARDS:
        expressions = [
            target["expr"] for panel in board(name)["panels"] for target in panel.get("targets", ())
        ]
        used = metrics_of("\n".join(expressions))
        meant = {metric.name for metric in TABLE if metric.dashboard == name}
        assert meant <= used
        others = {metric.name for metric in TABLE if metric.dashboard is None}
        assert not used & others, "mark it for the dashboard"


def test_alerts_name_metrics_of_the_table():
    assert metrics_of((ROOT / "deploy/dashboards/alerts.yml").read_text())
    with pytest.raises(KeyError, match="hocket_no_such_thing"):
        metrics_of("rate(hocket_no_such_thing[5m])")
    with pytest.raises(KeyError):
        metrics_of("hocket_requests")  # a counter is asked for by its whole name


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_are_what_grafana_reads(name):
    """The parts of Grafana's schema that an import needs; and no two panels on one place."""
    made = board(name)
    assert isinstance(made["schemaVersion"], int)
    assert re.fullmatch(r"[a-z0-9-]{1,40}", made["uid"])
    variables = {variable["name"] for variable in made["templating"]["list"]}
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    taken = set()
    for panel in made["panels"]:
        assert panel["type"] in {"row", "stat", "timeseries"}
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert 0 <= grid["x"] <= grid["x"] + grid["w"] <= 24
        assert not taken & cells
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
            named = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert named <= variables
            assert target["expr"].count("(") == target["expr"].count(")")


# --- cells ---


def test_a_value_on_a_bound_belongs_to_its_bucket():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 2.5):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.count, histogram.sum) == (5, 7.5)


def test_what_the_table_lacks_is_refused():
    store = MetricStore(TABLE)
    with pytest.raises(KeyError):
        store.number("no_such_metric")
    with pytest.raises(KeyError, match="instance"):
        store.number("requests_running")


def test_buckets_add_up_on_the_page():
    metrics = Metrics("m")
    for lag_s in (0.0001, 0.0015, 100):
        metrics.event_loop_lag(lag_s)
    buckets = list(samples(metrics.render(), "hocket_event_loop_lag_seconds_bucket").values())
    assert buckets[:3] == [1, 1, 2]
    assert buckets[-2:] == [2, 3]


# --- facts ---


def test_an_instances_counters_go_on_when_it_starts_again():
    metrics = Metrics("m")
    metrics.instance_ready(ONE, READY)
    metrics.step(ONE, view(), 0.5)
    metrics.step(ONE, view(num_steps=8, num_preemptions=2), 0.5)
    metrics.instance_down(ONE)
    page = metrics.render()
    for name in ("requests_running", "kv_cache_usage_ratio", "instance_up", "kv_blocks"):
        assert set(samples(page, f"hocket_{name}{{").values()) == {0}
    metrics.step(ONE, view(num_steps=1, num_preemptions=1), 0.5)
    page = metrics.render()
    assert list(samples(page, "hocket_steps_total").values()) == [9]
    assert list(samples(page, "hocket_preemptions_total").values()) == [3]


@pytest.mark.parametrize("metric", GAUGES_OF_INSTANCES, ids=lambda metric: metric.name)
def test_what_an_instance_said_is_not_said_when_it_is_down(metric):
    metrics = Metrics("m")
    name = f"{metric.exposed_name}{{"
    for instance in (ONE, InstanceId("i1")):
        metrics.instance_ready(instance, READY)
        metrics.step(instance, view(num_waiting=3, num_deferred=1), 0.5)
    before = samples(metrics.render(), name)
    of_one = {series: value for series, value in before.items() if 'instance="i0"' in series}
    assert all(of_one.values())
    assert of_one
    metrics.instance_down(ONE)
    after = samples(metrics.render(), name)
    assert {series for series in after if 'instance="i1"' in series} == set(before) - set(of_one)
    if metric.vanishes:
        assert not after.keys() & of_one.keys()
    else:
        assert {series: after[series] for series in of_one} == dict.fromkeys(of_one, 0)


def test_only_the_last_incarnations_configuration_is_shown():
    metrics = Metrics("m")
    metrics.instance_ready(ONE, READY)
    metrics.instance_ready(ONE, msgspec.structs.replace(READY, dtype="bfloat16"))
    (series,) = samples(metrics.render(), "hocket_config_info")
    assert 'dtype="bfloat16"' in series


def test_waiting_requests_are_told_apart():
    metrics = Metrics("m")
    metrics.step(ONE, view(num_waiting=5, num_deferred=2), 0.5)
    found = samples(metrics.render_vllm(), "vllm:num_requests_waiting_by_reason{")
    assert [(series.partition('reason="')[2][:8], n) for series, n in found.items()] == [
        ("capacity", 3), ("deferred", 2),
    ]  # fmt: skip


def test_blocks_are_in_one_state_each():
    metrics = Metrics("m")
    metrics.step(ONE, view(), 0.5)
    page = metrics.render()
    assert list(samples(page, "hocket_kv_blocks{").values()) == [2, 2, 1, 5]
    # Of 5 free ones, the longest run has 2.
    assert list(samples(page, "hocket_kv_fragmentation_ratio{").values()) == [0.6]
    assert list(samples(page, "hocket_batch_size_sum").values()) == [3]
    assert list(samples(page, "hocket_step_tokens_sum").values()) == [7]


def test_a_report_without_a_step_is_no_step():
    metrics = Metrics("m")
    metrics.step(ONE, view(num_steps=0), 0.0)
    metrics.step(ONE, view(num_steps=0), 0.0)
    assert not samples(metrics.render(), "hocket_step_seconds_count")


def test_names_of_unknown_fields_are_bounded():
    metrics = Metrics("m")
    for number in range(80):
        metrics.unknown_field(f"field_{number}")
    metrics.unknown_field("field_1")
    for odd in ("a b", 'x"} 1\nhocket_steps_total 9', "", "é" * 10, "x" * 65):
        metrics.unknown_field(odd)
    found = samples(metrics.render(), "hocket_unknown_fields_total")
    assert len(found) == 51
    assert found['hocket_unknown_fields_total{field="other",model="m"}'] == 30 + 5
    assert found['hocket_unknown_fields_total{field="field_1",model="m"}'] == 2


def test_rates_see_the_first_event():
    page = Metrics("m").render()
    for name in ("requests_total", "request_rejections_total", "preemptions_total"):
        values = samples(page, f"hocket_{name}")
        assert set(values.values()) <= {0}
    assert len(samples(page, "hocket_requests_total")) == 2 * 6
    for route in ("/v1/completions", "/v1/chat/completions"):
        for status in (200, 400, 429, 500, 503):
            labels = f'model="m",route="{route}",status="{status}"'
            assert samples(page, f"hocket_http_requests_total{{{labels}}}") != {}


def test_rates_of_an_instance_see_its_first_event():
    metrics = Metrics("m")
    metrics.instance_ready(ONE, READY)
    page = metrics.render()
    for metric in TABLE:
        if "instance" in metric.labels:
            assert samples(page, f"hocket_{metric.name}"), metric.name


def test_two_servers_in_one_process_do_not_meet():
    one, two = Metrics("m"), Metrics("m")
    one.next_tokens([0.1])
    assert list(samples(one.render(), "hocket_generation_tokens_total").values()) == [1]
    assert list(samples(two.render(), "hocket_generation_tokens_total").values()) == [0]


# --- where the time of a request went ---


def test_the_times_of_a_request_add_up():
    marks = RequestMarks(arrived_at_s=9.0, taken_at_s=10.0)
    assert marks.times().ttft_s is None
    assert marks.times().inference_s is None
    marks.started(0.5)
    assert marks.token(12.0) is None
    marks.started(99.0)  # again, after a preemption or elsewhere
    assert marks.times().tpot_s is None
    assert marks.token(13.0) == 1.0
    assert marks.token(15.0) == 2.0
    marks.ended(16.0)
    times = marks.times()
    assert (times.intake_s, times.queue_s) == (1.0, 0.5)
    assert (times.ttft_s, times.prefill_s) == (3.0, 1.5)
    assert (times.decode_s, times.inference_s, times.tpot_s) == (3.0, 4.5, 1.5)
    assert (times.e2e_s, times.num_tokens) == (7.0, 3)
