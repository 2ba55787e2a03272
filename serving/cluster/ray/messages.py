"""What is said when Ray places instances: plain data, msgpack of a fixed schema, no pickle.

Three ways: between the API process and the Ray control process (a socket pair), to an actor (the
argument of its one Ray call, as bytes), and the first frame of whoever calls in at the data plane.
"""

from __future__ import annotations

import msgspec

from serving.cluster.placement import Placement


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


# --- from the API process to the Ray control process ---


class Open(_Message, frozen=True, kw_only=True):
    """The first message: start a session of our own, or join the cluster at `address`."""

    address: str | None
    folder: str  # private, of the API process; the session's files and logs are in it
    name: str  # of the session; with a folder inside of that name, if it is our own
    prefix: str  # of the names of all that the server places


class Keep(_Message, frozen=True, kw_only=True):
    """Of what control processes before this one have placed, these live, and nothing else is to."""

    placements: dict[str, Placement]  # by name


class Place(_Message, frozen=True, kw_only=True):
    """Make an actor of this name and have it dial; answered by Placed, and then by Ended."""

    name: str
    placement: Placement
    dial: bytes


class Remove(_Message, frozen=True, kw_only=True):
    """Nothing of this name shall be left: neither its actor nor what was reserved for it."""

    name: str


ControlCommand = Open | Keep | Place | Remove


# --- from the Ray control process to the API process ---


class Opened(_Message, frozen=True, kw_only=True):
    """There is a Ray session."""

    address: str
    logs: str
    version: str
    node_host: str = ""  # of this machine, as the cluster's other nodes reach it
    num_nodes: int = 1


class CannotOpen(_Message, frozen=True, kw_only=True):
    """There is none; a line of cause, a line of remedy."""

    cause: str
    remedy: str


class Placed(_Message, frozen=True, kw_only=True):
    """Ray knows of the actor; when a node has room it will dial."""

    name: str


class Ended(_Message, frozen=True, kw_only=True):
    """There is no such actor, any more or at all; with a remedy if the user can mend it."""

    name: str
    cause: str
    remedy: str = ""


ControlReport = Opened | CannotOpen | Placed | Ended


# --- to the actor ---


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Who the caller is, and who alone it talks to: PEM."""

    authority: str
    certificate: str
    key: str


class Dial(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance calls in, and how it is known there."""

    name: str
    secret: str
    path: str = ""  # of a Unix socket; else host and port, by TLS
    host: str = ""
    port: int = 0
    tls: Tls | None = None
    build: str = ""  # "module:function" that puts the instance together; the engine's, if empty


# --- the first frame at the data plane ---


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls; a map, so that another version of us can be told from rubbish."""

    name: str
    secret: str
    channel: str
    version: str
    pid: int


COMMANDS, OUTPUT = "commands", "output"  # the channels of an incarnation

MAX_HELLO_BYTES = 1024

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[ControlCommand] = msgspec.msgpack.Decoder(ControlCommand)
_report_decoder: msgspec.msgpack.Decoder[ControlReport] = msgspec.msgpack.Decoder(ControlReport)
_dial_decoder: msgspec.msgpack.Decoder[Dial] = msgspec.msgpack.Decoder(Dial)
_hello_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)

# The decoders raise msgspec.DecodeError, or its child ValidationError, for anything else.


def encode(message: ControlCommand | ControlReport | Dial | Hello) -> bytes:
    return _encoder.encode(message)


def decode_command(data: bytes) -> ControlCommand:
    return _command_decoder.decode(data)


def decode_report(data: bytes) -> ControlReport:
    return _report_decoder.decode(data)


def decode_dial(data: bytes) -> Dial:
    return _dial_decoder.decode(data)


def decode_hello(data: bytes) -> Hello:
    return _hello_decoder.decode(data)
