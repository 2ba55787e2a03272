"""The instance's end of mutual TLS: `python -P -m serving.cluster.ray.tls_relay`.

The instance speaks over plain sockets, from several threads and in native code, and may crash at
any moment: what it said before must still arrive, so this is a process of its own. It looks into
nothing. When the driver is gone, so is the instance, even if that is stuck.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import msgspec

from serving.cluster.hosts.frames import FrameDecoder, frame
from serving.cluster.ray.messages import (
    COMMANDS,
    OUTPUT,
    Dial,
    Hello,
    decode_dial,
    decode_hello,
    encode,
)
from serving.cluster.ray.tls_context import DRIVER, instance_context

_PROGRAM = ("-m", "serving.cluster.ray.tls_relay")
_CHUNK_BYTES = 1 << 16
_CONNECT_S = 20.0
_END_GRACE_S = 0.5  # for an instance that was hung up on, to end by itself


def relayed(dial: Dial, hello: Hello) -> tuple[socket.socket, socket.socket]:
    """Start the relay of this process; return the ends for output and commands. Raises OSError."""
    pairs = [socket.socketpair() for _ in range(2)]
    theirs = [str(end.fileno()) for _, end in pairs]
    arguments = [sys.executable, "-P", *_PROGRAM, "--parent", str(os.getpid()), "--fds", *theirs]
    relay = subprocess.Popen(  # noqa: S603 (our own program)
        arguments,
        stdin=subprocess.PIPE,
        pass_fds=[end.fileno() for _, end in pairs],
    )
    assert relay.stdin is not None
    with relay.stdin:  # by a pipe, so that no key is seen among the arguments
        relay.stdin.write(frame(encode(dial)) + frame(encode(hello)))
    for _, end in pairs:
        end.close()
    return pairs[0][0], pairs[1][0]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -P -m serving.cluster.ray.tls_relay")
    parser.add_argument("--parent", type=int, required=True, help="of which process this is")
    parser.add_argument("--fds", type=int, nargs=2, required=True, help="for output and commands")
    arguments = parser.parse_args()
    dial, hello = _read()
    ends = [socket.socket(fileno=number) for number in arguments.fds]
    asyncio.run(_relay(dial, hello, ends, arguments.parent))


def _read() -> tuple[Dial, Hello]:
    dial, hello = FrameDecoder().feed(sys.stdin.buffer.read())
    return decode_dial(dial), decode_hello(hello)


async def _relay(dial: Dial, hello: Hello, ends: list[socket.socket], parent: int) -> None:
    assert dial.tls is not None
    context = instance_context(dial.tls)
    streams = []
    for channel, end in zip((OUTPUT, COMMANDS), ends, strict=True):
        async with asyncio.timeout(_CONNECT_S):
            there = await asyncio.open_connection(
                dial.host, dial.port, ssl=context, server_hostname=DRIVER
            )
        there[1].write(frame(encode(msgspec.structs.replace(hello, channel=channel))))
        here = await asyncio.open_unix_connection(sock=end)
        streams.append((here, there))
    (printing, prints), (commanding, commands) = streams
    outward = [
        asyncio.create_task(_carry(printing[0], prints[1])),
        asyncio.create_task(_carry(commanding[0], commands[1])),
    ]
    inward = asyncio.create_task(_carry(commands[0], commanding[1]))
    await asyncio.wait([inward, outward[1]], return_when=asyncio.FIRST_COMPLETED)
    if inward.done():  # the driver hung up: the instance sees it, and ends
        await asyncio.wait(outward[:1], timeout=_END_GRACE_S)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
    # What it printed last is read to its end, unless something that it started holds that open.
    await asyncio.wait(outward, timeout=_END_GRACE_S)


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Pass on all that comes, and then that nothing more comes."""
    try:
        while data := await source.read(_CHUNK_BYTES):
            target.write(data)
            await target.drain()
    except OSError:
        pass
    finally:
        target.close()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(target.wait_closed(), _END_GRACE_S)


if __name__ == "__main__":
    main()
