"""Errors as the OpenAI clients expect them: a status and one JSON shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

from puna.core.errors import PunaError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a request with a status and a JSON body.

    Args:
        status: HTTP status.
        message: What is wrong, and what to do about it.
        param: The field of the request that is wrong.
        code: A short name that programs can compare.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON body."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _KINDS.get(self.status, usual),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


def bad_request(error: PunaError, param: str | None = None) -> ApiError:
    """Turn a refusal of the engine or of the tokenizer into status 400."""
    message = error.message if error.fix is None else f"{error.message}; {error.fix}"
    is_too_long = "context" in error.message
    code = "context_length_exceeded" if is_too_long else "invalid_value"
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after_s: int) -> ApiError:
    """The server cannot work now; the client may try again."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})
