"""What schemathesis checks of every answer. Runs in its environment, not in ours."""

from __future__ import annotations

import schemathesis  # type: ignore[import-not-found]


@schemathesis.check
def fails_honestly(ctx, response, case):
    """No 500; 503 says when to come back; every refusal has the whole error object.

    504 is for the `timeout` that a request itself asks for.
    """
    status = response.status_code
    if status == 503 and case.path != "/health":
        assert "retry-after" in response.headers, "503 without Retry-After"
    elif status == 504:
        assert response.json()["error"]["code"] == "request_timeout", response.text[:300]
    else:
        assert status < 500, f"the server failed: {response.text[:300]}"
    if status >= 400 and case.method != "HEAD" and response.text:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["code"], str), error
