"""The program that renders chat templates: a process of its own, because only a process can be
stopped in the middle of `"x" * 10**9`. Started by `serving.text.chat` as a file, it imports nothing
of ours.

Speaks over its standard input, a socket: frames of JSON behind four bytes of length. The first
brings the template; the answer says which variables it reads, or why it cannot be compiled. Each
further one brings variables and is answered with the text, or with why there is none.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LENGTH = struct.Struct("!I")


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return what templates of model folders expect, as transformers sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment


def render(template: Template, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """Return {"text": ...} or {"refusal": why}; stops as soon as the text is too long."""
    pieces, num_chars = [], 0
    try:
        for piece in template.generate(**variables):
            num_chars += len(piece)
            if num_chars > max_chars:
                return {"refusal": f"its text would be longer than {max_chars} characters"}
            pieces.append(piece)
    except MemoryError:
        return {"refusal": "it needs too much memory"}
    except Exception as error:  # noqa: BLE001 (a template may raise anything at all)
        return {"refusal": str(error)[:300] or type(error).__name__}
    return {"text": "".join(pieces)}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _frames(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield what the other side sends, until it is gone."""
    reader = connection.makefile("rb")
    while head := reader.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(head)
        yield json.loads(reader.read(size))


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    payload = json.dumps(value).encode()
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def main() -> None:
    with socket.socket(fileno=0) as connection:
        frames = _frames(connection)
        first = next(frames)
        limit = first["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        environment = make_environment()
        try:
            names = meta.find_undeclared_variables(environment.parse(first["source"]))
            template = environment.from_string(first["source"])
        except (TemplateError, MemoryError, RecursionError) as error:
            _send(connection, {"refusal": f"it cannot be compiled: {error}"[:300]})
            return
        _send(connection, {"names": sorted(names)})
        for frame in frames:
            # Who waits here kills what is late; should it be gone, the kernel does.
            signal.setitimer(signal.ITIMER_REAL, frame["limit_s"])
            answer = render(template, frame["variables"], frame["max_chars"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(connection, answer)


if __name__ == "__main__":
    main()
