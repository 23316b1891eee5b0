"""One row of the ledger, made from what the broker saw on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from claude_wrapper.wire.usage import Usage

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR_MS = 3_600_000
_MILLISECOND = timedelta(milliseconds=1)
_MOST = 10**13
"""Above this a count is nonsense from upstream; a sum of them must still fit 64 bits."""
_TEXT = {"model": 200, "path": 200, "error_type": 100, "upstream_request_id": 200}
"""Longest texts that the table takes; upstream's are not ours to trust."""


class Call(Protocol):
    """One upstream call, finished: `broker.UpstreamCall`."""

    @property
    def id(self) -> str: ...
    @property
    def turn(self) -> str | None: ...
    @property
    def session(self) -> str | None: ...
    @property
    def org(self) -> str | None: ...
    @property
    def workspace(self) -> str | None: ...
    @property
    def key_id(self) -> str | None: ...
    @property
    def user(self) -> str | None: ...
    @property
    def credential_id(self) -> str | None: ...
    @property
    def path(self) -> str: ...
    @property
    def model(self) -> str | None: ...
    @property
    def status(self) -> int: ...
    @property
    def error_type(self) -> str | None: ...
    @property
    def upstream_request_id(self) -> str | None: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def started_at(self) -> datetime: ...
    @property
    def first_byte_seconds(self) -> float | None: ...
    @property
    def total_seconds(self) -> float: ...
    @property
    def attempts(self) -> int: ...
    @property
    def stream_complete(self) -> bool: ...
    @property
    def main(self) -> bool: ...
    @property
    def cache_hit(self) -> bool: ...
    @property
    def saved(self) -> Usage: ...


@dataclass(frozen=True, slots=True)
class Priced:
    """What a call cost, and by which prices."""

    micros: int
    version: str


Row = Mapping[str, Any]
"""A row of `usage_calls`: JSON values only, so that it can be spilled to a file and come back the same."""


LATER_COLUMNS: Row = {"saved_tokens": 0, "saved_micros": 0}
"""Columns that rows which an older server spilled do not have."""


def milliseconds(moment: datetime) -> int:
    """Whole milliseconds since 1970, rounded down."""
    return (moment - EPOCH) // _MILLISECOND


def row_of(call: Call, priced: Priced, saved_micros: int = 0) -> dict[str, Any]:
    """The ledger's row of a call. Pure; every value is an int, a bool, a text or None."""
    usage = call.usage
    return {
        "id": call.id,
        "org_id": call.org or "",
        "workspace_id": call.workspace or "",
        "key_id": call.key_id or "",
        "user_id": call.user or "",
        "session_id": call.session or "",
        "turn_id": call.turn or "",
        "credential_id": call.credential_id or "",
        "model": _text("model", call.model) or "",
        "path": _text("path", call.path) or "",
        "status": call.status,
        "error_type": _text("error_type", call.error_type),
        "upstream_request_id": _text("upstream_request_id", call.upstream_request_id),
        "started_ms": milliseconds(call.started_at),
        "first_byte_ms": None if call.first_byte_seconds is None else _ms(call.first_byte_seconds),
        "total_ms": _ms(call.total_seconds),
        "attempts": call.attempts,
        "complete": call.stream_complete,
        "main": call.main,
        "cache_hit": call.cache_hit,
        "input_tokens": min(usage.input_tokens, _MOST),
        "output_tokens": min(usage.output_tokens, _MOST),
        "cache_read_tokens": min(usage.cache_read_tokens, _MOST),
        "cache_write_5m_tokens": min(usage.cache_write_5m_tokens, _MOST),
        "cache_write_1h_tokens": min(usage.cache_write_1h_tokens, _MOST),
        "thinking_tokens": min(usage.thinking_tokens, _MOST),
        "web_search_requests": min(usage.web_search_requests, _MOST),
        "web_fetch_requests": min(usage.web_fetch_requests, _MOST),
        "cost_micros": min(priced.micros, _MOST),
        "saved_tokens": min(call.saved.prompt_tokens + call.saved.output_tokens, _MOST),
        "saved_micros": min(saved_micros, _MOST),
        "price_version": priced.version[:64],
    }


def _ms(seconds: float) -> int:
    return min(2**31 - 1, max(0, round(seconds * 1000)))


def _text(column: str, value: str | None) -> str | None:
    # NUL: Postgres refuses it in text, and one row that can never be written would hold up its whole batch.
    return None if value is None else value.replace("\x00", "")[: _TEXT[column]]
