"""An instance as a Ray actor, before it is one: nobody may ever say what it is for."""

from __future__ import annotations

import os
import threading

import pytest

from serving.cluster.ray import actor as module
from serving.cluster.ray.actor import InstanceActor
from serving.cluster.ray.messages import Dial, encode


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which it would have ended, as they come."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_one_that_is_forgotten_ends(exits, monkeypatch):
    monkeypatch.setattr(module, "_SERVE_S", 0.01)
    forgotten = InstanceActor()._forgotten
    forgotten.join(5)
    assert exits == [1]


def test_one_that_serves_is_not_forgotten(exits, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ignore_signals", lambda: None)
    served = []
    monkeypatch.setattr(module, "_called", lambda dial: (dial.name, "commands"))
    monkeypatch.setattr(module, "_print_to", lambda _: None)
    monkeypatch.setattr(module, "be_instance", lambda *calls: served.append(calls))
    monkeypatch.setattr(module, "_SERVE_S", 60.0)
    actor = InstanceActor()
    actor.serve(encode(Dial(name="m", secret="s", path=str(tmp_path))))
    assert served == [("commands", None)]
    actor._forgotten.join(5)
    assert actor._forgotten not in threading.enumerate()
    assert exits == []
