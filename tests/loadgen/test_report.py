"""The terminal fits a screen, the file gives the run back, the page is whole and harmless."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from loadgen.metrics import Slo, summarize
from loadgen.report import html, series, words
from loadgen.report.files import facts, read_json, write_json
from loadgen.report.terminal import print_report, sparkline
from loadgen.types import LoadError, Record, Run
from tests.loadgen.results import answer, failure, run_of

HOSTILE = "<script>alert(1)</script>\x1b[2J$x$"


def full_run(name="mock", num=60, **more):
    """Make a run in which everything that a report can show is there."""
    tenants = [f"tenant-{i}" for i in range(11)] + [HOSTILE]
    records = []
    for i in range(num):
        at = 0.1 * i
        times = [at + 0.2 + 0.05 * k for k in range(5)] + [at + 2.0]
        tenant = tenants[i % len(tenants)]
        records.append(answer(at, at + 0.2, times, at + 2.1, cached=2, output=12, tenant=tenant))
    records += [
        failure(1.0, 1.0, [], 1.1, error=f"http_{500 + i}", detail=HOSTILE, tenant="unlucky")
        for i in range(7)
    ]
    lags = (0.2,) * num
    return run_of(
        *records, name=name, lags_s=lags, interrupted=True, num_unsent=5, facts=facts(), **more
    )


def printed(run, summary, width=120):
    stream = io.StringIO()
    print_report(run, summary, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_the_terminal_shows_all_of_it_on_one_screen():
    run = full_run()
    text = printed(run, summarize(run, Slo.parse(["ttft:200", "tpot:50", "itl:500", "e2e:3000"])))
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for word in (
        "TTFT ms",
        "p99.9",
        "goodput",
        "stalls",
        "own lag",
        "fell behind by 3.39 %",
        "Interrupted",
    ):
        assert word in text
    assert "too few samples; needed: p90 100" in text
    assert "and 3 more" in text  # of 7 classes of errors
    assert "and 7 more" in text  # of 13 tenants
    assert "\x1b" not in text


def test_the_terminal_shows_a_run_without_requests():
    run = run_of(duration_s=0.0)
    text = printed(run, summarize(run))
    assert "No request was sent" in text
    assert "tenant" not in text


def test_markup_in_what_a_server_said_is_text():
    run = run_of(failure(0.0, 0.0, [], 1.0, error="http_400", detail="[red]not[/] a colour"))
    assert "[red]not[/] a colour" in printed(run, summarize(run))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.1234, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (99.99, "100"),
        (1e-9, "0"),
    ],
)
def test_numbers_have_three_figures(value, shown):
    assert words.number(value) == shown


def test_a_sparkline_runs_from_nothing_to_the_most():
    assert sparkline(series.np.array([0.0, 1.0, 8.0])) == "▁▂█"
    assert sparkline(series.np.zeros(3)) == ""
    assert sparkline(series.np.array([-4.0, 1.0, -1.0])) == "▁█▁"
    assert sparkline(series.np.array([-4.0, 0.0])) == ""


microseconds = st.integers(0, 10**10).map(lambda us: us / 1e6)
texts = st.text(max_size=8)
records = st.builds(
    Record,
    session=st.integers(0, 99),
    turn=st.integers(0, 3),
    tenant=texts,
    intended_at_s=microseconds,
    sent_at_s=microseconds,
    end_at_s=microseconds,
    received_at_s=st.lists(microseconds, max_size=5).map(sorted),
    stamped_at_s=st.lists(microseconds, max_size=3),
    num_prompt_tokens=st.integers(0, 99),
    num_cached_tokens=st.none() | st.integers(0, 9),
    num_output_tokens=st.integers(0, 9),
    finish_reason=texts,
    text=texts,
    error=texts,
    detail=texts,
)
runs = st.builds(
    Run,
    name=texts,
    url=texts,
    model=texts,
    seed=st.integers(),
    start_unix_s=st.floats(0, 2e9),
    duration_s=st.floats(0, 1e5),
    records=st.lists(records, max_size=4).map(tuple),
    interrupted=st.booleans(),
    num_unsent=st.integers(0, 9),
    lags_s=st.lists(microseconds, max_size=3).map(tuple),
    facts=st.dictionaries(texts, texts, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(runs)
def test_a_file_gives_the_same_run_back(tmp_path, run):
    path = tmp_path / "run.json"
    write_json(path, run, summarize(run))
    assert read_json(path) == run


def test_times_are_kept_to_the_microsecond_and_errors_do_not_add_up(tmp_path):
    times = [0.1 + 0.0123456789 * i for i in range(1000)]
    path = tmp_path / "run.json"
    run = run_of(answer(0.0, 0.0, times, 20.0))
    write_json(path, run, summarize(run))
    again = read_json(path).records[0].received_at_s
    assert max(abs(a - b) for a, b in zip(times, again, strict=True)) <= 0.51e-6
    assert path.stat().st_size < 15_000  # a dozen characters an event, and the summary
    assert not list(tmp_path.glob("*.part"))


def broken(document, *path, value):
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: "no json", "it is not JSON"),
        (lambda d: "[]", "does not say"),
        (lambda d: broken(d, "format", value="other"), "does not say"),
        (lambda d: broken(d, "version", value=99), "version 99"),
        (lambda d: broken(d, "run", value={}), "malformed"),
        (lambda d: broken(d, "run", "duration_s", value="long"), "duration_s"),
        (lambda d: broken(d, "num_records", value=3), "not 3"),
        (lambda d: broken(d, "records", "turns", value=[1]), "unknown columns turns"),
        (lambda d: broken(d, "records", "end_at_s", value=["now"]), "end_at_s"),
        (lambda d: broken(d, "records", "received_at_s", value=[5]), "received_at_s"),
    ],
)
def test_a_wrong_file_is_refused_with_cause_and_remedy(tmp_path, spoil, said):
    path = tmp_path / "run.json"
    run = run_of(answer(0.0, 0.0, [0.5], 1.0))
    write_json(path, run, summarize(run))
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(LoadError) as caught:
        read_json(path)
    assert said in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy


def test_a_file_that_is_not_there_or_cannot_be_is_said_so(tmp_path):
    run = run_of()
    with pytest.raises(LoadError, match=r"cannot read .*No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(LoadError, match=r"cannot write .*No such file"):
        write_json(tmp_path / "no-folder" / "run.json", run, summarize(run))


def test_facts_name_the_machine_and_hide_keys():
    found = facts(["/bin/bench", "--api-key", "s3cret", "--api-key=s3cret", "--max-tokens", "8"])
    assert found["command"] == "bench --api-key *** --api-key=*** --max-tokens 8"
    assert {"machine", "CPU", "Python", "numpy"} <= found.keys()
    assert all(found.values())


class Page(HTMLParser):
    """Checks that elements nest, and collects what a browser would load or run."""

    VOID = frozenset({"meta", "br", "use", "path"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += filter(None, [values.get("id")])
        self.links += [values[name] for name in ("href", "src", "data", "action") if name in values]
        assert not [name for name in values if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def two():
    runs = [full_run("left"), full_run("right")]
    return [(run, summarize(run, Slo(ttft_s=0.2))) for run in runs]


def test_the_page_is_well_formed_and_loads_nothing(two):
    text = html.page(two, [("measure", "A"), ("left <= right", "<b>")], ["left <= right"])
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    outside = text.replace(two[0][0].url, "")
    assert "http://" not in outside
    assert "https://" not in outside
    assert "url(" not in outside.replace("url(#", "")


def test_the_page_shows_names_as_text_and_each_chart_has_one(two):
    text = html.page(two)
    said = "".join(Page(text).words)
    assert "<script" not in text
    assert "<script>alert(1)" in said
    assert "\x1b" not in text
    assert text.count("<svg") == text.count('<svg role="img" aria-label="') == 4 + 4 + 2
    assert said.count("dashed: the SLO, 200 ms") == 1, "of TTFT; nothing was asked of the others"
    for word in ("left", "right", "p99.9", "Interrupted", "http_500", "Jain", "6 others together"):
        assert word in said


def test_the_page_follows_light_and_dark(two):
    text = html.page(two)
    drawings = text[text.index("<body") :]
    assert "var(--c1)" in drawings
    assert "stroke: #" not in drawings
    assert "fill: #" not in drawings


def test_the_same_runs_give_the_same_page(two):
    assert html.page(two) == html.page(two)


def test_the_page_of_an_empty_run_and_of_one_request(tmp_path):
    for run in (run_of(duration_s=0.0), run_of(answer(0.0, 0.0, [0.5], 1.0))):
        html.write_html(tmp_path / "page.html", [(run, summarize(run))])
        assert Page((tmp_path / "page.html").read_text()).open == []


def test_cdf_is_the_share_of_samples_at_most_so_large():
    values, shares = series.cdf([4.0, 1.0, 3.0, 2.0])
    assert values[0] == 1.0
    assert values[-1] == 4.0
    assert set(values[(shares > 0.5) & (shares <= 0.75)]) == {3.0}
    assert len(series.cdf([])[0]) == 0


def test_time_lines_count_requests_and_tokens():
    run = run_of(
        answer(0.0, 0.0, [1.0, 3.0], 4.0, prompt=10, output=4),
        answer(2.0, 2.0, [3.5], 4.0, prompt=6, output=1),
    )
    times, held = series.in_flight(run, num_points=4)
    assert list(times) == [0, 1, 2, 3]
    assert list(held) == [1, 1, 2, 2]
    (middles, into), (_, out) = series.tokens_per_s(run, num_bins=4)
    assert list(middles) == [0.5, 1.5, 2.5, 3.5]
    assert (list(into), list(out)) == ([0, 10, 0, 6], [0, 2, 0, 3])


def test_a_scatter_of_very_many_keeps_the_slowest():
    many = [answer(0.01 * i, 0.01 * i, [0.01 * i + 0.1], 60.0) for i in range(5000)]
    many[3333] = replace(many[3333], received_at_s=[59.0])
    times, ttfts_s = series.ttft_over_time(run_of(*many))
    assert len(times) <= 1700
    assert max(ttfts_s) == pytest.approx(59.0 - 33.33)
