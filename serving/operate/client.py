"""Asks the admin port of a server, by the standard library alone. Every failure is a UserError."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from serving.errors import UserError
from serving.listener import DEFAULT_ADMIN_PORT

ADMIN_KEY = "HOCKET_ADMIN_KEY"

_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 16 << 20
_NAME_IT = "name the admin port of a server with --admin http://127.0.0.1:PORT"
_REMEDIES = {  # by status, where the answer brings none
    401: f"put an operator's key into the variable {ADMIN_KEY}",
    403: "call it by a loopback name, or give a key",
}


class AdminClient:
    """A connection for each question, so that none is left over from long ago."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UserError for what is no address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = DEFAULT_ADMIN_PORT if parts.port is None else parts.port
        except ValueError:
            port = 0
        if parts.netloc.endswith(":"):  # as of a variable that is not set
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise UserError(f"--admin {url} is no address of a server", _NAME_IT)
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self.url = f"{parts.scheme}://{parts.hostname}:{port}"
        self._headers = {} if not key else {"authorization": f"Bearer {key}"}

    def get(self, path: str) -> dict[str, Any]:
        """Return the answer. Raises UserError."""
        return self._ask("GET", path, None)[1]

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Return status and answer. Raises UserError."""
        return self._ask("POST", path, body)

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        headers, data = dict(self._headers), None
        if body is not None:
            headers["content-type"] = "application/json"
            data = json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(error) from error
        except ValueError as error:  # a key that is no header
            raise UserError(f"the key in {ADMIN_KEY} cannot be sent", "check it") from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
            if not isinstance(answer, dict):
                raise TypeError
        except (ValueError, TypeError):
            raise UserError(f"what answers at {self.url} is no Hocket server", _NAME_IT) from None
        if response.status >= http.client.BAD_REQUEST:
            raise self._refused(response.status, answer)
        return response.status, answer

    def _no_answer(self, error: Exception) -> UserError:
        if isinstance(error, ConnectionRefusedError):
            remedy = "start one with --admin-port 8001, or name its admin port with --admin"
            return UserError(f"no server is at {self.url}", remedy)
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return UserError(f"no answer from {self.url}: {what}", "see its log, and try again")

    def _refused(self, status: int, answer: dict[str, Any]) -> UserError:
        error = answer.get("error")
        told = error if isinstance(error, dict) else {}
        message = str(told.get("message") or f"status {status}")
        remedy = told.get("remedy") or _REMEDIES.get(status)
        if told.get("code") in ("not_found", "method_not_allowed"):  # the path: some other port
            message, remedy = f"what answers at {self.url} is no admin port", _NAME_IT
        if status == http.client.SERVICE_UNAVAILABLE:
            remedy = remedy or "try again soon"
        return UserError(message, remedy or "see `hocket status`")
