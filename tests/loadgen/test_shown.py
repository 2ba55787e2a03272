"""What is shown of addresses and commands: neither passwords nor keys."""

from __future__ import annotations

import shlex

import pytest

from loadgen.shown import command_line, plain, without_user


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pass@host:1/v1", "http://host:1/v1"),
        ("https://key@host", "https://host"),
        ("http://a:p@ss@host/", "http://host/"),
        ("http://host/a@b", "http://host/a@b"),
        ("see http://u:p@a and http://u:p@b", "see http://a and http://b"),
        ("nobody@host", "nobody@host"),
    ],
)
def test_addresses_lose_their_user(url, shown):
    assert without_user(url) == shown


def test_nothing_that_steers_a_terminal_is_left():
    assert plain("a\x1b[2J\x07\u202eb\nc") == "a [2J  b c"


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "sk-1"],
        ["--api-key=sk-1"],
        ["--api-key sk-1"],
        ["--serve", "vllm serve --port {port} --api-key sk-1 --x 3"],
        ["--serve", "HOCKET_API_KEY=sk-1 hocket serve"],
        ["--serve", "serve --header 'Authorization: Bearer sk-1'"],
        ["--serve", "serve --api-key 'sk-1"],
        ["--hf-token", "sk-1"],
        ["http://me:sk-1@host"],
        ["--serve", "curl http://me:sk-1@host"],
    ],
)
def test_no_secret_is_kept_of_a_command(words):
    shown = command_line(["/opt/bin/hocket", "bench", *words, "--max-tokens", "8"])
    assert "sk-1" not in shown
    assert shown.startswith("hocket bench ")
    assert shown.endswith(" --max-tokens 8")


def test_a_command_can_be_typed_again():
    words = ["run", "http://host", "--extra", '{"top_p": 0.9}', "--output-tokens", "8"]
    shown = command_line(["/x/loadgen/__main__.py", *words])
    assert shlex.split(shown) == ["python", "-m", "loadgen", *words]
    assert command_line([]) == ""
