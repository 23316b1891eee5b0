"""What a turn comes to: how its end is told, what it used, what its user message looks like. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from claude_wrapper.errors import UpstreamError
from claude_wrapper.sessions.budgets import with_cost
from claude_wrapper.sessions.spec import TurnEnd
from claude_wrapper.wire.managed import END_TURN, EXHAUSTED, Outcome, TurnTranslator, error_event, upstream_error
from claude_wrapper.wire.usage import Usage

ListPrice = Callable[[str, Usage, datetime], int]
"""(model, usage, when) → micro-dollars."""


def outcome_of(translator: TurnTranslator, end: TurnEnd) -> Outcome:
    """What the client is told: what the broker saw, else what the CLI said."""
    if end.interrupted:
        return Outcome(END_TURN)
    error, told = end.error, translator.outcome
    if told is not None and (error is None or told.stop_reason["type"] != "retries_exhausted"):
        return told
    if isinstance(error, UpstreamError):
        return Outcome(EXHAUSTED, error=upstream_error(error.status, error.message))
    if error is not None:
        return Outcome(EXHAUSTED, error=error_event("unknown_error", error.message))
    return told or Outcome(END_TURN)


def with_usage(usage: Mapping[str, Any], end: TurnEnd, list_price: ListPrice) -> dict[str, Any]:
    """The session's usage and list cost with the turn's calls, as the broker saw them."""
    turn = sum((call.usage for call in end.calls), start=Usage())
    cached = usage.get("cache_creation") or {}
    tools = usage.get("server_tool_use") or {}
    shown = {
        "input_tokens": usage.get("input_tokens", 0) + turn.input_tokens,
        "output_tokens": usage.get("output_tokens", 0) + turn.output_tokens,
        "cache_read_input_tokens": usage.get("cache_read_input_tokens", 0) + turn.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": cached.get("ephemeral_5m_input_tokens", 0) + turn.cache_write_5m_tokens,
            "ephemeral_1h_input_tokens": cached.get("ephemeral_1h_input_tokens", 0) + turn.cache_write_1h_tokens,
        },
        "server_tool_use": {
            "web_search_requests": tools.get("web_search_requests", 0) + turn.web_search_requests,
            "web_fetch_requests": tools.get("web_fetch_requests", 0) + turn.web_fetch_requests,
        },
    }
    cost = sum(list_price(call.model, call.usage, call.started_at) for call in end.calls)
    return with_cost(shown, usage, cost)


def shown_content(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [block for block in blocks if block.get("type") in {"text", "image", "document"}]
