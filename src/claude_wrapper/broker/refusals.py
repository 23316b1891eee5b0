"""Errors in the shape of the Messages API, so that the CLI ends its turn at once and says why."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from claude_wrapper import errors


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that the broker gives by itself."""

    status: int
    type: str
    message: str
    retry_after: float | None = None

    def body(self) -> bytes:
        """`{"type":"error","error":{"type","message"}}`."""
        return msgspec.json.encode({"type": "error", "error": {"type": self.type, "message": self.message}})

    def headers(self) -> list[tuple[str, str]]:
        """Headers beside the length. `x-should-retry: false` holds also for clients that retry by status."""
        pairs = [("content-type", "application/json"), ("x-should-retry", "false")]
        if self.retry_after is not None:
            pairs.append(("retry-after", str(max(0, round(self.retry_after)))))
        return pairs


class Refused(Exception):
    """Carries a refusal to where the answer is written."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.message)


def refuse(status: int, kind: str, message: str, retry_after: float | None = None) -> Refused:
    """A refusal to raise."""
    return Refused(Refusal(status, kind, message, retry_after))


UNBOUND = Refusal(401, "authentication_error", "This process serves no session now: it cannot reach the model.")
WRONG_TOKEN = Refusal(401, "authentication_error", "The token is not the one of this endpoint.")
NO_TURN = Refusal(403, "permission_error", "No turn is running: model requests are only made within a turn.")
TOO_MANY_CALLS = Refusal(429, "rate_limit_error", "Too many requests of this process are in flight.", 1)
BUFFERS_FULL = Refusal(429, "rate_limit_error", "The requests of this process hold too much memory.", 1)
CLOSING = Refusal(503, "api_error", "The broker is shutting down.")
INTERNAL = Refusal(500, "api_error", "The broker failed to handle this request.")

_BY_ERROR: tuple[tuple[type[errors.WrapperError], int, str], ...] = (
    (errors.BudgetExceeded, 402, "billing_error"),
    (errors.RateLimited, 429, "rate_limit_error"),
    (errors.PermissionDenied, 403, "permission_error"),
    (errors.CredentialMissing, 401, "authentication_error"),
    (errors.AuthenticationFailed, 401, "authentication_error"),
    (errors.RequestTooLarge, 413, "request_too_large"),
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.NotFound, 404, "not_found_error"),
)


def refusal_of(error: errors.WrapperError) -> Refusal:
    """The refusal that tells the CLI of a domain error; what is not in the table is a 503."""
    for cls, status, kind in _BY_ERROR:
        if isinstance(error, cls):
            return Refusal(status, kind, error.message, error.retry_after)
    return Refusal(503, "api_error", error.message, error.retry_after)
