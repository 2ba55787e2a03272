"""The admin plane over a scripted instance: a drain that waits for running requests."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.scripted import Server, says


def test_a_drain_lets_requests_end_and_tells_how_many_are_left():
    async def scenario():
        async with Server(says("a" * 50)) as server:
            running = asyncio.ensure_future(server.complete(max_tokens=50, n=2))
            while not server.metric("hocket_generation_tokens_total"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for _ in range(2):
                answer = await server.admin("POST", "/admin/drain")
                assert (answer.status, answer.json()) == (
                    202,
                    {"status": "draining", "num_requests": 2},
                )
            refused = await server.complete()
            assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
            assert (await running).json()["usage"]["completion_tokens"] == 100
            answer = await server.admin("POST", "/admin/drain")
            assert (answer.status, answer.json()["status"]) == (200, "drained")
            assert await server.driver.drain(1.0), "SIGTERM after it finds nothing to wait for"

    asyncio.run(scenario())


def test_each_plane_has_only_its_own_routes():
    async def scenario():
        async with Server(says("a")) as server:
            assert (await server.get("/debug/state")).status == 404
            assert (await server.admin("GET", "/v1/models")).status == 404
            assert (await server.admin("GET", "/admin/drain")).status == 405

    asyncio.run(scenario())


def test_the_status_shows_instances_and_load():
    async def scenario():
        async with Server(says("a" * 50)) as server:
            running = asyncio.ensure_future(server.complete(max_tokens=50, n=2))
            await server.handle.was_submitted.wait()
            status = (await server.admin("GET", "/admin/status")).json()
            assert (status["model"], status["num_requests"], status["num_queued"]) == ("m", 2, 0)
            (instance,) = status["instances"]
            assert (instance["instance"], instance["state"]) == ("instance-0", "up")
            assert (instance["num_assigned"], instance["incarnation"]) == (2, 1)
            assert status["change"] is status["last_change"] is None
            await running
            server.handle.fail()
            status = (await server.admin("GET", "/admin/status")).json()
            assert status["instances"][0]["state"] == "down"

    asyncio.run(scenario())


def test_a_change_is_begun_and_shown():
    async def scenario():
        async with Server(says("a")) as server:
            answer = await server.admin("POST", "/admin/scale", {"instances": 1})
            assert (answer.status, answer.json()["status"]) == (202, "begun")
            assert answer.json()["change"]["title"] == "scaling to 1"
            async with asyncio.timeout(5):
                while (status := await server.admin("GET", "/admin/status")).json()["change"]:
                    pass
            assert status.json()["last_change"]["title"] == "scaling to 1"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("scale", None, 400, "invalid_value"),
        ("scale", {}, 400, "invalid_value"),
        ("scale", {"instances": "2"}, 400, "invalid_value"),
        ("scale", {"instances": True}, 400, "invalid_value"),
        ("scale", {"instances": 0}, 400, "invalid_value"),
        ("scale", {"instances": 1, "wait": True}, 400, "invalid_value"),
        ("scale", {"instances": 2}, 409, "cannot_scale"),
        ("restart", None, 409, "nothing_would_serve"),
        ("restart", {"instance": "instance-0"}, 400, "invalid_value"),
        ("restart", [], 400, "invalid_value"),
        ("restart", {}, 409, "nothing_would_serve"),
        ("drain", {"instance": 1}, 400, "invalid_value"),
        ("drain", {"instance": None}, 400, "invalid_value"),
        ("drain", {"instance": ""}, 400, "invalid_value"),
        ("drain", [], 400, "invalid_value"),
        ("drain", b"null", 400, "invalid_value"),
        ("drain", b'{"instance": "instance-0", "instance": ""}', 400, "invalid_value"),
        ("drain?instance=instance-0", None, 400, "invalid_value"),
        ("drain", {"instances": 1}, 400, "invalid_value"),
        ("drain", {"instance": "instance-7"}, 404, "instance_not_found"),
        ("drain", {"instance": "instance-0"}, 409, "nothing_would_serve"),
    ],
)
def test_a_change_that_cannot_be_made(path, body, status, code):
    async def scenario():
        async with Server(says("a")) as server:
            answer = await server.admin("POST", f"/admin/{path}", body)
            error = answer.json()["error"]
            assert (answer.status, error["code"]) == (status, code)
            assert any(word in error["message"] for word in ("instance", "body", "wait"))
            assert "remedy" in error or status != 409
            assert not server.driver.draining

    asyncio.run(scenario())
