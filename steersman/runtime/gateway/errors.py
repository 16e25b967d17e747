"""Errors in the form of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """An answer with an error: HTTP status, one sentence, and the fields of the OpenAI API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


def internal_error() -> ApiError:
    """A bug of ours; the log has its traceback."""
    return ApiError(500, "the gateway failed on this request", code="internal_error")
