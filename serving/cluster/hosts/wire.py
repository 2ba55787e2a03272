"""Messages as bytes: msgpack of a fixed schema. No pickle, nothing executable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from engine.messages import Begin, Command, Report, StartReport


# Paths are the one type of these messages that msgpack does not know; NotImplementedError is what
# msgspec asks its hooks to raise for any other.
def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} does not travel")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_path)
_begin_decoder: msgspec.msgpack.Decoder[Begin] = msgspec.msgpack.Decoder(
    Begin, dec_hook=_decode_path
)
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
_any_report_decoder: msgspec.msgpack.Decoder[Report | StartReport] = msgspec.msgpack.Decoder(
    Report | StartReport
)

# The decoders raise msgspec.DecodeError, or its child ValidationError, for anything else.


def encode(message: Begin | Command | Report | StartReport) -> bytes:
    return _encoder.encode(message)


def decode_begin(data: bytes) -> Begin:
    return _begin_decoder.decode(data)


def decode_command(data: bytes) -> Command:
    return _command_decoder.decode(data)


def decode_report(data: bytes) -> Report:
    return _report_decoder.decode(data)


def decode_any_report(data: bytes) -> Report | StartReport:
    """Decode what a process sends: how its start goes, and then reports."""
    return _any_report_decoder.decode(data)
