"""Strict JSON: the depth that is counted without parsing is the depth that parsing finds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api import json_limits
from serving.api.json_limits import parse_json
from serving.errors import InvalidRequest

TEXTS = st.text(alphabet='[]{}"\\,:ax\n\u00e9\U0001f600', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=30,
)


def depth(value):
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@settings(deadline=None, max_examples=100)
@given(value=VALUES, limit=st.integers(0, 5), ascii_only=st.booleans())
def test_what_is_shallow_is_read_and_what_is_deep_is_not(value, limit, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_limits, "MAX_DEPTH", limit)
        if depth(value) <= limit:
            assert parse_json(body) == value
        else:
            with pytest.raises(InvalidRequest, match="deeper"):
                parse_json(body)


@settings(deadline=None, max_examples=200)
@given(body=st.binary(max_size=40) | st.text('[]{}",:\\1eNu-. ', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(body):
    """Never another exception; and what is read, the standard library reads alike."""
    try:
        value = parse_json(body)
    except InvalidRequest:
        return
    assert json.loads(body) == value


def test_a_name_that_comes_twice_is_found_in_one_pass():
    class Name(str):
        __slots__ = ()
        num_compared = 0

        def __eq__(self, other):
            Name.num_compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = [Name(f"a{number}") for number in range(2000)]
    with pytest.raises(InvalidRequest, match="'a1999' comes twice"):
        json_limits._unique_names([(name, 1) for name in [*names, names[-1]]])
    assert Name.num_compared < 10 * len(names)


def test_only_the_seed_is_wide():
    assert parse_json(b'{"seed": 9223372036854775807}') == {"seed": 2**63 - 1}
    assert parse_json(b'{"n": 9007199254740992}') == {"n": 2**53}
    for body, param in (
        (b'{"n": 9007199254740993}', "n"),
        (b'{"x": {"seed": 9223372036854775807}}', "x"),
        (b"[9007199254740993]", None),
    ):
        with pytest.raises(InvalidRequest, match="beyond") as error:
            parse_json(body)
        assert error.value.param == param
