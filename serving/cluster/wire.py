"""Messages as bytes: msgpack of a fixed schema. No pickle, nothing executable."""

from __future__ import annotations

import msgspec

from engine.messages import Command, Report

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """Raises msgspec.DecodeError or msgspec.ValidationError for anything else."""
    return _command_decoder.decode(data)


def decode_report(data: bytes) -> Report:
    """Raises msgspec.DecodeError or msgspec.ValidationError for anything else."""
    return _report_decoder.decode(data)
