"""One table: every error code of the server, as HTTP status and Anthropic error type.

A test compares the table with the classes in `claude_wrapper.errors`: a new error without a row does not pass.
Statuses and types follow the Anthropic API's own table, so that the official SDKs raise their own exception classes and
retry exactly what is worth retrying.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from claude_wrapper.errors import UpstreamError, WrapperError


@dataclass(frozen=True, slots=True)
class Row:
    """How one code looks on the wire."""

    status: int
    error_type: str


ANTHROPIC: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "internal_error": Row(500, "api_error"),
        "invalid_request": Row(400, "invalid_request_error"),
        "request_too_large": Row(413, "request_too_large"),
        "not_found": Row(404, "not_found_error"),
        "conflict": Row(409, "conflict_error"),
        "memory_precondition_failed": Row(409, "memory_precondition_failed_error"),
        "memory_path_conflict": Row(409, "memory_path_conflict_error"),
        "precondition_failed": Row(412, "invalid_request_error"),
        "authentication_failed": Row(401, "authentication_error"),
        "permission_denied": Row(403, "permission_error"),
        "credential_missing": Row(403, "permission_error"),
        "rate_limited": Row(429, "rate_limit_error"),
        "budget_exceeded": Row(402, "billing_error"),
        "pool_overloaded": Row(529, "overloaded_error"),
        "pool_timeout": Row(529, "overloaded_error"),
        "draining": Row(503, "api_error"),
        "spawn_failed": Row(503, "api_error"),
        "agent_crashed": Row(502, "api_error"),
        "agent_protocol_error": Row(502, "api_error"),
        "agent_timeout": Row(504, "timeout_error"),
        "turn_interrupted": Row(409, "conflict_error"),
        "output_limit_exceeded": Row(502, "api_error"),
        "upstream_error": Row(502, "api_error"),
        "upstream_unavailable": Row(503, "api_error"),
        "configuration_error": Row(500, "api_error"),
        "sandbox_unavailable": Row(503, "api_error"),
        "storage_unavailable": Row(503, "api_error"),
        "lease_lost": Row(503, "api_error"),
        "held_elsewhere": Row(503, "api_error"),
        "snapshot_corrupted": Row(500, "api_error"),
        "vault_sealed": Row(503, "api_error"),
        "illegal_transition": Row(500, "api_error"),
    }
)

_PASSED_ON: Final = frozenset({400, 402, 403, 404, 408, 409, 413, 429, 500, 503, 504, 529})
"""Upstream statuses that mean the same to our caller. A 401 does not: the caller's key to us is right, its upstream credential is not."""


def status_and_type(error: WrapperError) -> Row:
    """The row of this error; upstream's own status and type where they mean the same to our caller."""
    if isinstance(error, UpstreamError):
        if error.status in _PASSED_ON:
            return Row(error.status, error.error_type)
        if error.status == 401:
            return Row(401, "authentication_error")
    return ANTHROPIC.get(error.code, ANTHROPIC["internal_error"])


def body(error: WrapperError, request_id: str) -> bytes:
    """The JSON body; readable by both the Anthropic and the OpenAI SDK family."""
    row = status_and_type(error)
    content: dict[str, Any] = {"type": row.error_type, "message": error.message, "code": error.code, "param": None}
    field = getattr(error, "field", None)
    if field:
        content["param"] = field
    if error.details:
        content["details"] = error.details
    return msgspec.json.encode({"type": "error", "error": content, "request_id": request_id})


def headers(error: WrapperError) -> dict[str, str]:
    """`retry-after` where waiting helps; `x-should-retry: false` where the SDK would retry in vain."""
    out: dict[str, str] = dict(getattr(error, "headers", {}))
    if error.retry_after is not None:
        out.setdefault("retry-after", str(math.ceil(error.retry_after)))
    row = status_and_type(error)
    if row.status == 409 and not error.retryable:
        out["x-should-retry"] = "false"
    return out


def response(error: WrapperError, request_id: str) -> Response:
    """The whole error response."""
    return Response(
        body(error, request_id),
        status_code=status_and_type(error).status,
        headers=headers(error),
        media_type="application/json",
    )


async def on_wrapper_error(request: Request, error: Exception) -> Response:
    """Starlette exception handler for every domain error."""
    assert isinstance(error, WrapperError)  # noqa: S101 - registered for this class only
    note(request, error)
    return response(error, request_id_of(request))


def note(request: Request, error: WrapperError) -> None:
    """Tell the request's log line and metrics what went wrong."""
    fields = request.scope.get("log_fields")
    if fields is not None:
        fields["error"] = error.code
        fields |= {name: error.details[name] for name in ("limit", "scope") if name in error.details}


def request_id_of(request: Request) -> str:
    """The id that the middleware gave this request."""
    return str(request.scope.get("request_id", "req_unknown"))
