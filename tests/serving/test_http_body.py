"""Bodies: what was put in chunks comes out, whatever the pieces, and what is none is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import RequestError
from serving.http_body import MAX_TRAILER_BYTES, ChunkedBody, DeclaredBody

PARTS = st.lists(
    st.sampled_from([b"a", b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"x" * 300]), max_size=5
)
EXTENSIONS = st.sampled_from([b"", b";a", b" ;a=b", b';a="b"'])
TRAILERS = st.lists(st.sampled_from([b"A: b", b"0", b"C:"]), max_size=2)
BEHIND = st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", b"0\r\n\r\n"])


def taken(body, data, cuts):
    """Feed the data cut at these places; return the body and what was behind it, None if open."""
    whole, rest, start = b"", b"", 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        part, rest, is_complete = body.take(rest + data[start:end])
        whole, start = whole + part, end
        if is_complete:
            return whole, rest + data[end:]
    return None


@settings(deadline=None, max_examples=300)
@given(PARTS, EXTENSIONS, TRAILERS, BEHIND, st.lists(st.integers(0, 2000), max_size=6), st.data())
def test_chunks_are_what_was_put_in(parts, extension, trailers, behind, cuts, data):
    written = data.draw(st.sampled_from([b"%x", b"%X", b"00%x"]))
    chunks = [written % len(part) + extension + b"\r\n" + part + b"\r\n" for part in parts]
    sent = b"".join([*chunks, b"0", extension, b"\r\n", *(line + b"\r\n" for line in trailers)])
    assert taken(ChunkedBody(), sent + b"\r\n" + behind, cuts) == (b"".join(parts), behind)
    assert taken(ChunkedBody(), sent + b"\r", cuts) is None


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=1, max_size=50), BEHIND, st.lists(st.integers(0, 60), max_size=4))
def test_a_declared_length_is_what_is_taken(whole, behind, cuts):
    assert taken(DeclaredBody(len(whole)), whole + behind, cuts) == (whole, behind)
    assert taken(DeclaredBody(len(whole) + 1), whole, cuts) is None


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b"1 \r\n", b" 1\r\n", b"1\n\n\r\n",
        b"1\r\nab\r\n", b"1\r\na\n\r\n", b"1;a\0\r\n", b"1;a\nb\r\n", b"1" * 17 + b"\r\n",
        b"1;" + b"a" * 5000, b"1;" + b"a" * 5000 + b"\r\n",
        b"0\r\n" + b"a" * (MAX_TRAILER_BYTES + 1), b"0\r\n" + b"a: b\r\n" * MAX_TRAILER_BYTES,
    ],
)  # fmt: skip
@pytest.mark.parametrize("cuts", [(), range(0, 6000, 7), range(40)])
def test_what_are_no_chunks_is_refused(sent, cuts):
    with pytest.raises(RequestError):
        taken(ChunkedBody(), sent, cuts)
