"""Every error as ``{"error": {"message", "type", "param", "code"}}``, whatever layer finds it."""

from __future__ import annotations

import orjson

from p2pdyn.core.request import Failure

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class HttpError(Exception):
    """An answer other than 200. ``headers`` are further header lines, each with its CRLF."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: bytes = b"",
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers
        self.type = type or TYPES.get(status, "server_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error}, default=str)

    @classmethod
    def of(cls, failure: Failure) -> HttpError:
        """The answer for what the mesh could not do. 429 and 503 always say when to come back; another 5xx says not to,
        by the header that openai's clients obey: the request may be what breaks."""
        retry = failure.retry_after
        if retry is None and failure.status in (429, 503):
            retry = 1
        headers = b"x-should-retry: false\r\n" if retry is None and failure.status >= 500 else retry_after(retry)
        return cls(failure.status, failure.message, failure.code, headers=headers)


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> HttpError:
    """400: the request cannot mean what it says; ``message`` says what would."""
    return HttpError(400, message, code, param)


def retry_after(seconds: int | None) -> bytes:
    return b"" if seconds is None else b"retry-after: %d\r\n" % seconds


def unknown_path(path: str) -> HttpError:
    return HttpError(404, f"There is no path {path[:200]!r} here; see /v1/models, /v1/chat/completions.", "not_found")


def wrong_method(method: str, allowed: str) -> HttpError:
    message = f"{method} is not a method of this path; use {allowed}."
    return HttpError(405, message, "method_not_allowed", headers=b"allow: %b\r\n" % allowed.encode())


def internal() -> HttpError:
    return HttpError(500, "The frontend failed on this request; its log says why.", "internal_error")
