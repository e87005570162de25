"""Every refusal of the data plane, in OpenAI's shape: one function a case, so that the table is read in one place.

`{"error": {"message", "type", "param", "code"}}`. OpenAI's clients choose the exception class by status and retry
408, 409, 429 and 5xx by themselves; `x-should-retry` overrides that, `Retry-After` (seconds, at most 60 here, because
they ignore or give up on longer ones) says when.
"""

from __future__ import annotations

import json

_LONGEST_NAME = 256  # of a foreign text that is repeated in a message

Headers = tuple[tuple[bytes, bytes], ...]


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers
        self._error = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> bytes:
        return json.dumps({"error": self._error}, separators=(",", ":")).encode()


def invalid_api_key() -> ApiError:
    """Missing, malformed, unknown, revoked and expired look alike: a guesser learns nothing."""
    return ApiError(
        401,
        "invalid_api_key",
        "Incorrect or missing API key. Send it as `Authorization: Bearer sk-...`.",
        headers=((b"www-authenticate", b"Bearer"),),
    )


def model_not_found(model: str) -> ApiError:
    """Unknown and not allowed look alike."""
    return ApiError(
        404,
        "model_not_found",
        f"The model `{model[:_LONGEST_NAME]}` does not exist or you do not have access to it.",
        param="model",
    )


def invalid_request(message: str, *, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request", message, param=param)


def request_too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"The request body is larger than the {limit} bytes that are accepted.")


def unknown_route(method: str, path: str) -> ApiError:
    return ApiError(404, None, f"Invalid URL ({method} {path[:_LONGEST_NAME]})")


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    return ApiError(405, None, f"Not allowed to {method} on {path}.", headers=((b"allow", allowed.encode()),))


def rate_limit_exceeded(message: str, retry_after_seconds: int, more: Headers = ()) -> ApiError:
    return ApiError(
        429,
        "rate_limit_exceeded",
        message,
        kind="rate_limit_error",
        headers=(*_retry_after(retry_after_seconds), *more),
    )


def insufficient_quota(message: str, more: Headers = ()) -> ApiError:
    """A budget that is spent comes back next month: nobody should wait for that."""
    return ApiError(
        429,
        "insufficient_quota",
        message,
        kind="insufficient_quota",
        headers=((b"x-should-retry", b"false"), *more),
    )


def model_starting(model: str, retry_after_seconds: int) -> ApiError:
    return ApiError(
        503,
        "model_starting",
        f"The model `{model}` has no replica that is ready yet. Try again in {retry_after_seconds} s.",
        kind="service_unavailable_error",
        headers=_retry_after(retry_after_seconds),
    )


def queue_full(model: str, retry_after_seconds: int) -> ApiError:
    return ApiError(
        429,
        "queue_full",
        f"Too many requests wait for the model `{model}`. Try again in {retry_after_seconds} s.",
        kind="rate_limit_error",
        headers=_retry_after(retry_after_seconds),
    )


def model_paused(model: str, retry_after_seconds: int | None) -> ApiError:
    """`retry_after_seconds`: None if the end of the pause is unknown or too far away to wait for."""
    return ApiError(
        503,
        "model_paused",
        f"The model `{model}` is paused by its operators.",
        kind="service_unavailable_error",
        headers=((b"x-should-retry", b"false"),) if retry_after_seconds is None else _retry_after(retry_after_seconds),
    )


def nothing_known_yet() -> ApiError:
    """The directory was never read: neither models nor keys are known. No code says so; `model_starting` is nearest."""
    return ApiError(
        503,
        "model_starting",
        "The proxy has just started and cannot read its list of models and keys yet. Try again in 5 s.",
        kind="service_unavailable_error",
        headers=_retry_after(5),
    )


def numbers_unknown() -> ApiError:
    """A part of the processes' numbers would look like counters that fell, so that a scrape gets none."""
    return ApiError(503, None, "The numbers of all workers could not be had in time.", kind="server_error")


def upstream_error(message: str) -> ApiError:
    return ApiError(502, "upstream_error", message, kind="server_error")


def upstream_timeout(message: str) -> ApiError:
    return ApiError(504, "upstream_timeout", message, kind="server_error")


def _retry_after(seconds: int) -> Headers:
    return ((b"retry-after", str(seconds).encode()),)


class BadRequest(ApiError):
    """Not HTTP as it should be: after it, nobody can be sure where the next request begins."""


def bad_request(message: str) -> BadRequest:
    return BadRequest(400, "invalid_request", message)


def head_too_large(limit: int) -> ApiError:
    sentence = f"The request's headers are larger than the {limit} bytes that are accepted."
    return ApiError(431, "invalid_request", sentence)


def request_timeout() -> ApiError:
    return ApiError(408, "request_timeout", "The request did not arrive in time.")
