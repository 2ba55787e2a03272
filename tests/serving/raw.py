"""An HTTP client that sends exactly these bytes, for tests where the bytes matter."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

TIMEOUT_S = 5.0  # a server that hangs fails the test, not the run


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self):
        """The nested object, checked to be whole."""
        whole = json.loads(self.body)
        assert list(whole) == ["error"]
        error = whole["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert isinstance(error["message"], str)
        assert isinstance(error["code"], str)
        assert error["type"] == ("server_error" if self.status >= 500 else "invalid_request_error")
        assert error["param"] is None or isinstance(error["param"], str)
        return error


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)


def send(url: str, data: bytes, *, method: str = "GET", end: bool = False) -> Answer:
    """Send the bytes on a connection of their own; `end` says that no more will come."""
    with connect(url) as raw:
        try:
            raw.sendall(data)
            if end:
                raw.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it answered before it had heard all
        return receive(raw, method)


def receive(raw: socket.socket, method: str = "GET") -> Answer:
    """Return the answer on this connection; one that has come with the next is lost."""
    response = http.client.HTTPResponse(raw, method=method)
    try:
        response.begin()
        return Answer(response.status, response.headers, response.read())
    finally:
        response.close()


def request(
    method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    """Return a whole request; `headers` replace those that an honest client sends."""
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json"}
    if body or method == "POST":
        fields["Content-Length"] = str(len(body))
    fields |= headers or {}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
