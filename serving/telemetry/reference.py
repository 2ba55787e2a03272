"""The page about metrics for people, made of the table: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.telemetry.metric import PREFIX, VLLM_PREFIX, Alias, Metric
from serving.telemetry.table import PROCESS_METRICS, TABLE

_HEAD = """\
# Metrics

<!-- Made by `python -m serving.telemetry.generate`; edit `serving/telemetry/table.py` instead. -->

`GET /metrics` is in Prometheus's text format. Every metric has the label `model`; `instance` is
the instance's name. Instances report to the API process, which counts: one registry, one page,
whatever the number of instances, and no multiprocess mode.

Prometheus puts a label `instance` of its own (the address it scraped) on what it reads. With
`honor_labels: true` ours stays where a metric has one. Every server has an `instance-0`, so the
scrape must tell servers apart by another label: without one, two servers write into the same
series, and its rates are nonsense. The scrape configuration in
[deploy/dashboards/prometheus.yml](../deploy/dashboards/prometheus.yml) makes the label `server` of
the address, and alerts and dashboards tell instances apart by `server` and `instance`.

When an instance is down, its gauges are 0, and those for which 0 would say something else are gone.

- A **request** is one choice of one prompt: `n: 2` for three prompts are six. Latencies begin when
  the head of the HTTP request was there, before its body was read and its prompt tokenised.
- **Latencies of a whole request** (E2E, TPOT, decode, inference) and its lengths are of those that
  ended with `stop` or `length`; one that was given up says nothing about them. Queue time, prefill
  and TTFT are of all that came so far.
- **Tokens** are those that were delivered: what was computed behind a stop string does not count.
- The time that one request spent where is in its line of the log (`--log-level debug`).

"""

_VLLM = """
## vLLM's names

`GET /metrics/vllm` has the same numbers, at the same moment, under the names that vLLM 0.32 gives
them, for gateways (the endpoint picker of the Gateway API Inference Extension reads the first
three gauges, and block size and count as labels of `vllm:cache_config_info`) and for dashboards
made for vLLM. It is a page of its own, because names with a colon do not pass `promtool check
metrics`, and because nobody wants every number stored twice: scrape one of the two. A gateway is
told the path: `--model-server-metrics-path=/metrics/vllm` of the endpoint picker, or the same in
its configuration.

The label `model` is `model_name` there, and `instance` is `engine`. Buckets are ours, which are
vLLM's and some more. What differs from vLLM: metrics that are not of an instance have no `engine`;
an answer of one token has no `vllm:request_time_per_output_token_seconds`, where vLLM counts a 0;
a request that waits is `deferred` while another computes its prefix, which vLLM does not wait for;
queue time, prefill and `vllm:request_params_n` are counted when they are known, not at the end. A
repeated prompt counts in full in `vllm:prompt_tokens_total`, and what was cached of it in
`vllm:prompt_tokens_cached_total`, as in vLLM.

"""

_ALERTS = """
## Dashboards and alerts

[deploy/dashboards](../deploy/dashboards) holds two Grafana dashboards, made of the same table
(import the JSON, choose a Prometheus), alert rules with tests for promtool, and a scrape
configuration. `make system` runs a real Prometheus against a server under load and asks it every
query of every panel.
"""


def reference() -> str:
    """Return the page."""
    return _HEAD + _native() + _process() + _VLLM + _aliases() + _ALERTS


def _native() -> str:
    rows = (
        (
            f"`{metric.exposed_name}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.help,
            metric.fact,
        )
        for metric in TABLE
    )
    buckets = "".join(
        f"- `{PREFIX}{metric.name}`: {' '.join(f'{bound:g}' for bound in metric.buckets)}\n"
        for metric in TABLE
        if metric.buckets
    )
    titles = ("Name", "Kind", "Labels", "What it is", "Counted when, or read from")
    return f"## Ours\n\n{_grid(titles, rows)}\nBuckets:\n\n{buckets}"


def _process() -> str:
    rows = ((f"`{name}`", text) for name, text in PROCESS_METRICS.items())
    return f"\nOf the API process, from /proc:\n\n{_grid(('Name', 'What it is'), rows)}"


def _aliases() -> str:
    pairs = [(metric, metric.vllm) for metric in TABLE if metric.vllm is not None]
    rows = (
        (
            f"`{VLLM_PREFIX}{alias.name}{'_total' * (metric.kind == 'counter')}`",
            f"`{metric.exposed_name}`",
            _differences(metric, alias),
        )
        for metric, alias in pairs
    )
    return _grid(("vLLM's name", "Ours", "Labels"), rows)


def _differences(metric: Metric, alias: Alias) -> str:
    words = [f"`{ours}` is `{theirs}`" for ours, theirs in alias.labels.items()]
    if alias.only is not None:
        words.append(f"only {', '.join(alias.only[1])}")
    words += [f"without `{name}`, summed" for name in alias.summed]
    others = [
        name for name in metric.labels if name not in {"instance", *alias.labels, *alias.summed}
    ]
    return "; ".join([*words, *(f"`{name}`" for name in others)])


def _grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
