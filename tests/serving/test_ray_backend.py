"""The Ray control process: what it says of a head that ends. No Ray is needed for that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving.cluster.ray import backend as module
from serving.cluster.ray.messages import Open, Opened


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
