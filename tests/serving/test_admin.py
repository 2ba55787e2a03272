"""The admin plane over a scripted instance: a drain that waits for running requests."""

from __future__ import annotations

import asyncio

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
