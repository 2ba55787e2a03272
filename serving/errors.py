"""The errors that the shell shows to people. Owns their tree; never prints and never exits.

Exception
|-- UserError            a mistake or a lack that the operator can mend: cause, remedy
`-- RequestError         what a client of the API is told: message, type, param, code, status
    |-- InvalidRequest   400  the request itself is wrong
    |   `-- ContextTooLong
    |-- Unauthorized     401  no key, or one that nobody has
    |-- HostNotAllowed   403  called by a name that may be an attacker's
    |-- NotFound         404  no such model
    |-- RequestTimedOut  408  the body did not come
    |-- Conflict         409  not now, or not on this server: what operators are told, with a remedy
    |-- BodyTooLarge     413
    |-- UnsupportedMedia 415  not JSON, or compressed
    |-- HeadersTooLarge  431
    |-- RetryLater            the same request may work later, and the answer says when
    |   |-- TooManyRequests 429  this tenant has its share already
    |   `-- Unavailable    503  loading, draining or full
    |-- GenerationFailed 500  the model failed on this request, and on no other
    |-- InstanceLost     500  the instance that ran the request failed
    `-- DeadlineExceeded 504  the client's own `timeout` has passed
"""

from __future__ import annotations

import math
from typing import ClassVar

_MAX_MESSAGE_CHARS = 1000


class UserError(Exception):
    """Something the user can mend; the command line prints it without a traceback.

    `cause` is one line: what went wrong, with the names involved. `remedy` is one line: what to
    do now. str() is the cause.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        # Both go to args, so that the error survives pickling between processes.
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return self.cause


class RequestError(Exception):
    """What a client is told, as OpenAI's clients expect it; the HTTP status picks their class."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        if len(message) > _MAX_MESSAGE_CHARS:  # it may quote what the client sent
            message = message[:_MAX_MESSAGE_CHARS] + "..."
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON body that OpenAI's API uses."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        return {}


def internal_error() -> RequestError:
    """Return what a client is told of a fault in the server itself."""
    return RequestError("the server failed on this request; its log says why")


class InvalidRequest(RequestError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextTooLong(InvalidRequest):
    """Clients such as LiteLLM know this case by the words `maximum context length is`."""

    default_code = "context_length_exceeded"

    def __init__(self, num_tokens: int, max_model_len: int, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"has {num_tokens} tokens, which leaves no room for an answer. Please shorten it.",
            param=param,
        )


class NotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class Unauthorized(RequestError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "Incorrect API key provided, or none. "  # LiteLLM looks for the first four words
            "Send it as: Authorization: Bearer KEY"
        )

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class HostNotAllowed(RequestError):
    status = 403
    type = "invalid_request_error"
    default_code = "host_not_allowed"


class RequestTimedOut(RequestError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(RequestError):
    """The fleet cannot be changed so; only the admin plane says this."""

    status = 409
    type = "invalid_request_error"
    default_code = "change_under_way"

    def __init__(self, message: str, remedy: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.remedy = remedy

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": super().body()["error"] | {"remedy": self.remedy}}


class UnsupportedMedia(RequestError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class HeadersTooLarge(RequestError):
    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class BodyTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class RetryLater(RequestError):
    """OpenAI's clients wait as told, then try again."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        # Retry-After has whole seconds; a 0 would be read as "at once".
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_s))),
            "retry-after-ms": str(max(1, round(self.retry_after_s * 1000))),
            "x-should-retry": "true",
        }


class TooManyRequests(RetryLater):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Unavailable(RetryLater):
    status = 503
    default_code = "unavailable"


class GenerationFailed(RequestError):
    """The model could not compute this request, or we not its answer; those beside it go on.

    Why is for the log: what a model raises may quote requests, and names the machine's files.
    """

    status = 500
    default_code = "generation_failed"

    def __init__(self) -> None:
        super().__init__("this request could not be computed; the server's log says why")

    def headers(self) -> dict[str, str]:
        """Tell OpenAI's clients, which retry every 500, that this one would fail again."""
        return {"x-should-retry": "false"}


class InstanceLost(RequestError):
    status = 500
    default_code = "instance_failed"


class Quarantined(RequestError):
    """Instances died of this very request: it is not run again for a while."""

    status = 500
    default_code = "request_quarantined"

    def __init__(self) -> None:
        super().__init__(
            "instances of the model failed on this very request; it is not run again for now"
        )

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class DeadlineExceeded(RequestError):
    status = 504
    default_code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("the request's timeout has passed", param="timeout")

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}  # it would take as long again
