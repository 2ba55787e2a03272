"""Every answer has an id, whoever gives it; a fault of the server is answered and logged once."""

from __future__ import annotations

import asyncio
import json

import pytest

from serving.api.entrance import Entrance
from serving.api.service import Service
from tests.serving.scripted import JSON, Server, says


@pytest.mark.parametrize(("given", "shown"), [("mine-1", "mine-1"), (None, None)])
def test_an_unforeseen_fault_is_a_500_with_an_id_and_one_entry_in_the_log(
    monkeypatch, caplog, given, shown
):
    monkeypatch.setattr(Service, "check", lambda *_: 1 / 0)
    headers = JSON | ({"x-request-id": given} if given else {})
    body = json.dumps({"prompt": "secret words"}).encode()

    async def scenario():
        async with Server(says("a")) as server:
            return await server._call("POST", "/v1/completions", body, headers)

    answer = asyncio.run(scenario())
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == (shown or answer.headers["x-request-id"])
    assert len(answer.headers["x-request-id"]) == (6 if given else 32)
    assert "ZeroDivision" not in answer.text
    (entry,) = [record for record in caplog.records if record.exc_info]
    assert entry.getMessage() == "a request failed inside the server"


def test_the_answer_while_the_model_loads_has_an_id_too():
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "headers": [(b"x-request-id", b"mine-2")]}
    asyncio.run(Entrance()(scope, receive, send))
    assert sent[0]["status"] == 503
    assert (b"x-request-id", b"mine-2") in sent[0]["headers"]
