"""Frames on a stream of bytes: any pieces give the same payloads, and garbage ends in an error."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.hosts import frames
from serving.cluster.hosts.frames import FrameConnection, FrameDecoder, FrameError, frame


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 30), min_size=1))
def test_any_pieces_give_the_payloads(payloads, sizes):
    data = b"".join(map(frame, payloads))
    decoder, found, at, turn = FrameDecoder(), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        found += decoder.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert found == payloads
    assert decoder.is_empty


def test_a_frame_is_bounded_both_ways(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 8)
    assert list(FrameDecoder().feed(frame(b"x" * 8))) == [b"x" * 8]
    with pytest.raises(FrameError, match="9 bytes, and 8 may be"):
        frame(b"x" * 9)
    with pytest.raises(FrameError, match="9 bytes, and 8 may be"):
        list(FrameDecoder().feed(b"\0\0\0\x09"))


def test_what_came_before_garbage_is_given():
    payloads = FrameDecoder().feed(frame(b"good") + b"GET / HTTP/1.1\r\n\r\n")
    assert next(payloads) == b"good"
    with pytest.raises(FrameError):
        next(payloads)


def test_frames_cross_a_socket_and_an_end_within_one_is_an_error():
    near, far = socket.socketpair()
    with near, far:
        sender, receiver = FrameConnection(near), FrameConnection(far)
        for payload in (b"", b"a", b"b" * 100_000):
            sender.send(payload)
        near.sendall(frame(b"torn")[:-1])
        near.shutdown(socket.SHUT_WR)
        payloads = receiver.payloads()
        assert [next(payloads) for _ in range(3)] == [b"", b"a", b"b" * 100_000]
        with pytest.raises(FrameError, match="within a frame"):
            next(payloads)


def test_a_stream_that_ends_between_frames_is_over():
    near, far = socket.socketpair()
    with far:
        FrameConnection(near).send(b"a")
        near.close()
        assert list(FrameConnection(far).payloads()) == [b"a"]
