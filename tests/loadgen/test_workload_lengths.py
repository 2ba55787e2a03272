"""Lengths: what each spec means, by its moments and quantiles, and what is refused."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from loadgen.types import LoadError
from loadgen.workload.lengths import (
    Fixed,
    PowerLaw,
    Uniform,
    fit_context,
    parse_lengths,
    read_lengths,
)


def sample(spec, num=40_000):
    return parse_lengths(spec).sample(np.random.default_rng(3), num)


def test_a_number_is_a_fixed_length():
    assert parse_lengths("128") == Fixed(128)
    assert sample("128", 3).tolist() == [128, 128, 128]


def test_uniform_reaches_both_ends_alike():
    assert parse_lengths("uniform:16-19") == Uniform(16, 19)
    values, counts = np.unique(sample("uniform:16-19"), return_counts=True)
    assert values.tolist() == [16, 17, 18, 19]
    assert counts.max() / counts.min() < 1.05


def test_lognormal_by_mean_and_cv():
    lengths = sample("lognormal:200,cv=1.0")
    assert lengths.mean() == pytest.approx(200, rel=0.03)
    assert lengths.std() / lengths.mean() == pytest.approx(1.0, rel=0.06)
    assert np.median(lengths) == pytest.approx(200 / np.sqrt(2), rel=0.03)  # mean / sqrt(1 + cv^2)


def test_lognormal_by_quantiles():
    lengths = sample("lognormal:p50=74,p99=3388")
    assert np.median(lengths) == pytest.approx(74, rel=0.05)
    assert np.quantile(lengths, 0.99) == pytest.approx(3388, rel=0.1)
    assert lengths.min() == 1


def test_a_lognormal_can_be_cut():
    lengths = sample("lognormal:200,cv=2,max=500")
    assert lengths.max() == 500
    assert (lengths == 500).mean() == pytest.approx(0.083, abs=0.01)  # 1 - Phi(1.39)


@pytest.mark.parametrize(
    ("spec", "mean", "alpha"), [("short", 128, 2.0), ("medium", 256, 1.5), ("long", 512, 1.15)]
)
def test_power_laws_are_those_of_the_artifact(spec, mean, alpha):
    assert parse_lengths(spec) == PowerLaw(mean, alpha)
    lengths = sample(spec)
    assert 0.9 * mean < lengths.mean() < 1.03 * mean  # the cut takes from it, rounding up adds
    assert lengths.max() <= 6144
    ranks = np.arange(1, 2 * mean)
    scale = mean / ((ranks ** (1 - alpha)).sum() / (ranks**-alpha).sum())
    first = 1 / (ranks**-alpha).sum()
    assert (lengths == np.ceil(scale)).mean() == pytest.approx(first, abs=0.01)
    assert ((lengths - 1) // scale == 1).mean() == pytest.approx(first / 2**alpha, abs=0.01)


def test_the_tail_of_short_is_cut_at_6144_tokens():
    lengths = sample("short", 200_000)
    assert lengths.max() == 6144
    assert 10 < (lengths == 6144).sum() < 1000


def test_lengths_from_files(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("5\n\n7\n5\n")
    table = tmp_path / "table,1.csv.gz"
    table.write_bytes(gzip.compress(b'name,"out put"\na,10\n"b,c",20\n'))
    assert read_lengths(plain) == (5, 7, 5)
    assert read_lengths(table, "out put") == (10, 20)
    assert set(sample(f"file:{plain}").tolist()) == {5, 7}
    assert sample(f"file:{plain}").mean() == pytest.approx(17 / 3, rel=0.02)
    assert set(sample(f"file:{table},column=out put", 50).tolist()) == {10, 20}


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("", "no such form"),
        ("0", "no such form"),
        ("-3", "no such form"),
        ("normal:3", "no such form"),
        ("short:3", "no such form"),
        ("file:", "no such form"),
        ("uniform:16", "LOW-HIGH"),
        ("uniform:9-3", "LOW <= HIGH"),
        ("uniform:0-3", "LOW <= HIGH"),
        ("lognormal:200", "a mean and cv"),
        ("lognormal:200,cv=x", "'x' is not a number"),
        ("lognormal:200,cv=-1", "positive"),
        ("lognormal:nan,cv=1", "positive"),
        ("lognormal:200,cv=1,max=0", "positive"),
        ("lognormal:p50=9,p99=3", "p50 below p99"),
        ("file:/nowhere/at/all", "No such file"),
        ("99999999999999999999999", "at most 10,000,000"),
        ("9" * 5000, "at most 10,000,000"),
        ("uniform:1-99999999999999999999", "at most 10,000,000"),
        ("lognormal:200,cv=1e300", "at most 10,000,000"),
        ("lognormal:1e300,cv=1", "at most 10,000,000"),
        ("lognormal:p50=1e-320,p99=5", "positive"),
    ],
)
def test_bad_specs_are_named(spec, cause):
    with pytest.raises(LoadError) as caught:
        parse_lengths(spec)
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy


@pytest.mark.parametrize(
    ("content", "column", "cause"),
    [
        ("", None, "holds no length"),
        ("a,b\n", "b", "holds no length"),
        ("5\nx\n", None, "line 2: 'x'"),
        ("5\n0\n", None, "line 2: '0'"),
        ("a,b\n1,2\n3\n", "b", "line 3: ''"),
        ("a,b\n1,2\n", "c", "no column 'c'"),
        ("", "c", "no column 'c'"),
        ("5\n99999999999\n", None, "line 2: '99999999999'"),
        ("5\n" + "9" * 5000 + "\n", None, "line 2: '9999"),
        ("5\n5\r6\n", None, "line 2: new-line character"),
        ("5\n" + "x" * 140_000 + "\n", None, "line 2: field larger than"),
        ("a\rb\n5\n", "b", "line 1: new-line character"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, column, cause):
    path = tmp_path / "lengths.csv"
    path.write_text(content, newline="")
    with pytest.raises(LoadError) as caught:
        read_lengths(path, column)
    assert len(caught.value.cause) < len(str(path)) + 300
    assert cause in caught.value.cause
    assert str(path) in caught.value.cause


def test_a_prompt_gives_way_to_its_answer():
    assert fit_context(100, 20, None) == (100, 20)
    assert fit_context(100, 20, 120) == (100, 20)
    assert fit_context(100, 20, 119) == (99, 20)
    assert fit_context(100, 500, 120) == (1, 119)
