"""The precise loop waits for as long as its next timer says, not for whole milliseconds."""

from __future__ import annotations

import asyncio
import select

from loadgen.timing import precise_loop


def test_the_wait_for_a_timer_is_not_rounded(monkeypatch):
    waits = []
    real = select.select

    def watched(readers, writers, errors, timeout):
        waits.append(timeout)
        return real(readers, writers, errors, timeout)

    monkeypatch.setattr("loadgen.timing.select.select", watched)
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(asyncio.sleep(0.0003))
    assert any(0 < wait <= 0.0003 for wait in waits)


def test_the_precise_loop_reads_and_writes_sockets():
    async def echo(reader, writer):
        writer.write(await reader.readexactly(4))
        writer.close()

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"ping")
            said = await reader.read()
            writer.close()
        return said

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        assert runner.run(main()) == b"ping"
