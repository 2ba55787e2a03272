"""The Ray control process: a head that ends, strangers, what it leaves. No Ray is needed for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from serving.cluster.placement import Placement
from serving.cluster.ray import backend as module
from serving.cluster.ray import opening
from serving.cluster.ray.messages import Keep, Open, Opened, Place
from serving.errors import UserError


class Exited(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """One whose head has ended, as it sees at its first look; at the second it is stopped."""
    looks = iter([0])

    def poll():
        if next(looks, None) is None:
            raise Exited("stopped")
        return 0

    def end(status):
        raise Exited(status)

    head = SimpleNamespace(
        all_processes={"gcs_server": [SimpleNamespace(process=SimpleNamespace(poll=poll))]}
    )
    opened = Opened(address="", logs="", version="")
    monkeypatch.setattr(module, "own_session", lambda _: (head, opened))
    monkeypatch.setattr(module, "_quieten", lambda _: None)
    monkeypatch.setattr(module, "_HEAD_POLL_S", 0.001)
    monkeypatch.setattr(module.os, "_exit", end)
    order = Open(address=None, folder=str(tmp_path), name="s1", prefix="hocket-1-")
    return module._Backend(order, SimpleNamespace(send=lambda _: None))


def test_a_head_that_is_lost_is_told_and_ends_it(backend, capsys):
    with pytest.raises(Exited, match="1"):
        backend.run()
    assert capsys.readouterr().err == "Ray's gcs_server has ended\n"


def test_a_head_that_it_ends_itself_is_no_news(backend, capsys, monkeypatch):
    # The main thread looks while the other one ends what there is.
    monkeypatch.setattr(module, "end_session", lambda *_, **__: backend.run())
    with pytest.raises(Exited, match="stopped"):
        backend.leave()
    assert capsys.readouterr().err == ""


# --- the cluster of others ---


@pytest.mark.parametrize("at", ["127.0.0.1:6379", "192.0.2.1:6379"])
def test_a_cluster_that_asks_for_no_token_is_refused_wherever_it_is_said_to_be(at, monkeypatch):
    """A head that is reached at loopback listens to everyone all the same."""
    ray = SimpleNamespace(
        __version__="2.60.0",
        _private=SimpleNamespace(ray_constants=SimpleNamespace()),
        init=lambda *_, **__: None,
        get_runtime_context=lambda: SimpleNamespace(gcs_address=at),
    )
    client = SimpleNamespace(GcsClient=lambda **_: None)
    for name, fake in (("ray", ray), ("ray._private", ray._private), ("ray._raylet", client)):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(opening, "checked_address", lambda address: address)
    monkeypatch.setattr(opening, "asks_for_a_token", lambda _: False)
    with pytest.raises(UserError, match="asks nobody for a token"):
        opening.joined(Open(address=at, folder="", name="s1", prefix="hocket-1-"))


@pytest.fixture
def joined(backend, monkeypatch):
    """One in a cluster with two instances of this server's; it notes what it removes."""
    backend._is_ours, backend._is_open = False, True
    backend.removed = []
    monkeypatch.setattr(module, "_names", lambda prefix: [f"{prefix}i0-1", f"{prefix}i1-2"])
    monkeypatch.setattr(backend, "_remove", backend.removed.append)
    return backend


def test_whoever_placed_it_is_removed_at_the_end(joined):
    with pytest.raises(Exited, match="0"):
        joined.leave()
    assert joined.removed == ["hocket-1-i0-1", "hocket-1-i1-2"]
    with pytest.raises(UserError):  # and nothing comes after that
        joined._made(lambda: None)


def test_what_one_before_has_placed_is_removed_unless_it_lives(joined, monkeypatch):
    monkeypatch.setattr(joined, "_begin", lambda what, argument: what(argument))
    joined._obey(Keep(placements={"hocket-1-i1-2": Placement()}))
    assert joined.removed == ["hocket-1-i0-1"]


# --- a session of our own ---


def test_what_is_older_than_the_session_has_its_room_there(backend, monkeypatch):
    made = []

    def group(name, placement):
        made.append((name, placement))
        return SimpleNamespace(wait=made.append)

    monkeypatch.setattr(module, "_group", group)
    monkeypatch.setattr(backend, "_begin", lambda _, order: made.append(order.name))
    older = Placement(num_cpus=1, memory_bytes=1 << 30, num_devices=2)
    backend._obey(Keep(placements={"older": older, "asks for nothing": Placement()}))
    backend._obey(Place(name="new", placement=Placement(), dial=b""))
    held = Placement(num_cpus=1, num_devices=2)  # its memory is not free anyway
    assert made == [("older", held), module._HOLD_S, "new"]
