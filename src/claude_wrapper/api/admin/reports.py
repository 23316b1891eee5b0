"""Usage and cost reports in Anthropic's shapes, and the ledger itself as JSON, CSV or Parquet."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.responses import Response

from claude_wrapper.api.admin.budgets import cents
from claude_wrapper.api.admin.http import AdminRoute, Asked, json
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.usage import Bucket, Dimension, Line, Query, forms
from claude_wrapper.usage.entries import EPOCH
from claude_wrapper.usage.listing import list_calls
from claude_wrapper.usage.reports import MOST_ROWS

_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
_DIMENSIONS: Final[Mapping[str, Dimension]] = {
    "api_key_id": Dimension.KEY,
    "workspace_id": Dimension.WORKSPACE,
    "model": Dimension.MODEL,
    "user_id": Dimension.USER,
    "session_id": Dimension.SESSION,
    "organization_id": Dimension.ORGANIZATION,
}
_FILTERS: Final[Mapping[str, Dimension]] = {f"{name}s": dimension for name, dimension in _DIMENSIONS.items()}
_NOT_RECORDED: Final = (
    "service_tier",
    "context_window",
    "inference_geo",
    "product",
    "speed",
    "cost_type",
    "token_type",
)
"""Dimensions of the real API that the ledger does not have; null in the answers."""
_PAGE: Final = re.compile(r"page_(\d{1,15})\Z")
_CALL_PAGE: Final = re.compile(r"page_(\d{1,15})\.([0-9A-Za-z_-]{1,128})\Z")


@dataclass(frozen=True, slots=True)
class _Width:
    step: timedelta
    bucket: Bucket
    default: int
    most: int


_WIDTHS: Final[Mapping[str, _Width]] = {
    "1d": _Width(_DAY, Bucket.DAY, 7, 31),
    "1h": _Width(_HOUR, Bucket.HOUR, 24, 168),
}


async def usage_report(asked: Asked) -> Response:
    """Token usage over time, by hour or day."""
    return await _report(asked, usage_of)


async def cost_report(asked: Asked) -> Response:
    """Costs over time, by hour or day, in cents."""
    return await _report(asked, cost_of)


async def usage_list(asked: Asked) -> Response:
    """Token usage as rows, by any dimensions and, if asked for, by time."""
    return await _rows(asked, "usage", usage_of)


async def cost_list(asked: Asked) -> Response:
    """Costs as rows, by any dimensions and, if asked for, by time."""
    return await _rows(asked, "cost", cost_of)


async def export_ledger(asked: Asked) -> Response:
    """The ledger call by call: `format` is json, csv or parquet; further rows under `next_page` (or `cw-next-page`)."""
    form = asked.one("format") or "json"
    if form not in {"json", "csv", "parquet"}:
        raise InvalidRequest("use json, csv or parquet", field="format")
    start, end = _period(asked, _DAY)
    limit, after = asked.number("limit", 10_000), None
    if (page := asked.one("page")) is not None:
        if (found := _CALL_PAGE.match(page)) is None:
            raise InvalidRequest("this is not a cursor of ours; start again without it", field="page")
        after = (int(found[1]), found[2])
    rows = await asked.see(list_calls, start, end, after=after, limit=limit)
    more = f"page_{rows[-1]['started_ms']}.{rows[-1]['id']}" if len(rows) == limit else None
    if form == "json":
        return json({"data": rows, "has_more": more is not None, "next_page": more})
    write = forms.to_csv if form == "csv" else forms.to_parquet
    content = await asyncio.to_thread(write, rows)
    kind = "text/csv; charset=utf-8" if form == "csv" else "application/vnd.apache.parquet"
    headers = {"content-disposition": f'attachment; filename="usage-{start:%Y-%m-%d}.{form}"'}
    if more is not None:
        headers["cw-next-page"] = more
    return Response(content, media_type=kind, headers=headers)


# Buckets ----------------------------------------------------------------------------------------------------------------


async def _report(asked: Asked, measure: Callable[[Line], dict[str, Any]]) -> Response:
    width = _width(asked, "bucket_width", "1d")
    start, end = _period(asked, width.step)
    limit = asked.number("limit", width.default)
    if not 1 <= limit <= width.most:
        raise InvalidRequest(f"must be from 1 to {width.most} for this bucket width", field="limit")
    if (page := asked.one("page")) is not None:
        if (found := _PAGE.match(page)) is None:
            raise InvalidRequest("this is not a cursor of ours; start again without it", field="page")
        start = max(start, floor(datetime.fromtimestamp(min(int(found[1]), 253_000_000_000), UTC), width.step))
    by = _group_by(asked)
    stop = min(end, start + limit * width.step)
    lines = await _all(asked, Query(start, stop, by, width.bucket, _where(asked))) if start < stop else ()
    at: dict[datetime | None, list[Line]] = {}
    for line in lines:
        at.setdefault(line.start, []).append(line)
    data = []
    moment = start
    while moment < stop:
        results = [{**_who(line), **measure(line)} for line in at.get(moment, ())]
        data.append({"starting_at": moment, "ending_at": moment + width.step, "results": results})
        moment += width.step
    more = f"page_{int(stop.timestamp())}" if stop < end else None
    return json({"data": data, "has_more": more is not None, "next_page": more})


async def _rows(asked: Asked, name: str, measure: Callable[[Line], dict[str, Any]]) -> Response:
    width = _width(asked, "time_bucket_width", None)
    start, end = _period(asked, _HOUR if width is None else width.step)
    limit = asked.number("limit", 100)
    if not 1 <= limit <= 1000:
        raise InvalidRequest("must be from 1 to 1000", field="limit")
    offset = 0
    if (page := asked.one("page")) is not None:
        if (found := _PAGE.match(page)) is None:
            raise InvalidRequest("this is not a cursor of ours; start again without it", field="page")
        offset = int(found[1])
    bucket = Bucket.ALL if width is None else width.bucket
    query = Query(start, end, _group_by(asked), bucket, _where(asked), limit=limit + 1, offset=offset)
    lines = await asked.deps.tenants.reports.run(asked.principal, query)
    more = f"page_{offset + limit}" if len(lines) > limit else None
    data = []
    for line in lines[:limit]:
        began = line.start or start
        ended = end if width is None else began + width.step
        measured = measure(line)
        data.append({"starting_at": began, "ending_at": ended, "group": _who(line), name: measured})
    return json({"data": data, "has_more": more is not None, "next_page": more})


async def _all(asked: Asked, query: Query) -> Sequence[Line]:
    """All lines of a page of buckets, however many groups there are."""
    found: list[Line] = []
    while True:
        some = await asked.deps.tenants.reports.run(
            asked.principal,
            Query(query.start, query.end, query.by, query.bucket, query.where, offset=len(found)),
        )
        found += some
        if len(some) < MOST_ROWS:
            return found


def usage_of(line: Line) -> dict[str, Any]:
    """What was used, in Anthropic's names. Pure."""
    usage = line.usage
    written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    return {
        "uncached_input_tokens": usage.input_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_write_5m_tokens,
            "ephemeral_1h_input_tokens": usage.cache_write_1h_tokens,
        },
        "output_tokens": usage.output_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "total_tokens": usage.input_tokens + usage.cache_read_tokens + written + usage.output_tokens,
        "server_tool_use": {
            "web_search_requests": usage.web_search_requests,
            "web_fetch_requests": usage.web_fetch_requests,
        },
        "requests": line.calls,
        "errors": line.errors,
    }


def cost_of(line: Line) -> dict[str, Any]:
    """What it cost, in cents as text. Pure."""
    amount = cents(line.cost_micros or 0)
    return {
        "currency": "USD",
        "amount": amount,
        "list_amount": amount,
        "requests": line.calls,
        "description": line.who.get(Dimension.MODEL) or None,
    }


def _who(line: Line) -> dict[str, Any]:
    known = {name: line.who.get(dimension) or None for name, dimension in _DIMENSIONS.items()}
    return {**known, **dict.fromkeys(_NOT_RECORDED)}


def _group_by(asked: Asked) -> tuple[Dimension, ...]:
    found: list[Dimension] = []
    for name in asked.many("group_by") or ():
        dimension = _DIMENSIONS.get("model" if name == "description" else name)
        if dimension is None:
            raise InvalidRequest(f"{name[:50]!r} is not recorded here; use {', '.join(_DIMENSIONS)}", field="group_by")
        if dimension not in found:
            found.append(dimension)
    return tuple(found)


def _where(asked: Asked) -> dict[Dimension, list[str]]:
    given = ((dimension, asked.many(name)) for name, dimension in _FILTERS.items())
    return {dimension: values for dimension, values in given if values is not None}


def _width(asked: Asked, name: str, default: str | None) -> Any:
    value = asked.one(name) or default
    if value is None:
        return None
    if value not in _WIDTHS:
        raise InvalidRequest("use 1d or 1h", field=name)
    return _WIDTHS[value]


def _period(asked: Asked, step: timedelta) -> tuple[datetime, datetime]:
    """Whole steps: the start rounded down, the end up; without an end, until now."""
    start = asked.moment("starting_at")
    if start is None:
        raise InvalidRequest("is needed, as in 2026-01-31T00:00:00Z", field="starting_at")
    end = asked.moment("ending_at") or asked.scribe.now()
    start = floor(start, step)
    end = _ceiling(end, step)
    if start >= end:
        raise InvalidRequest("must be after starting_at", field="ending_at")
    if end - start > timedelta(days=366 * 20):
        raise InvalidRequest("the period is longer than twenty years", field="starting_at")
    return start, end


def floor(moment: datetime, step: timedelta) -> datetime:
    """The last whole step at or before this moment."""
    return moment - (moment - EPOCH) % step


def _ceiling(moment: datetime, step: timedelta) -> datetime:
    down = floor(moment, step)
    return down if down == moment else down + step


_TIME = ("starting_at", "ending_at", "limit", "page", "group_by[]")
_BY = tuple(f"{name}[]" for name in _FILTERS)
_USAGE = ("/v1/organizations/usage_report/messages", "/v1/organizations/analytics/usage_report")
_COST = ("/v1/organizations/cost_report", "/v1/organizations/analytics/cost_report")
_FLAT = (*_TIME, "time_bucket_width", *_BY)

ROUTES = (
    *(AdminRoute("GET", path, "read:usage", usage_report, query=(*_TIME, "bucket_width", *_BY)) for path in _USAGE),
    *(AdminRoute("GET", path, "read:costs", cost_report, query=(*_TIME, "bucket_width", *_BY)) for path in _COST),
    AdminRoute("GET", "/v1/organizations/analytics/usage", "read:usage", usage_list, query=_FLAT),
    AdminRoute("GET", "/v1/organizations/analytics/cost", "read:costs", cost_list, query=_FLAT),
    AdminRoute(
        "GET",
        "/v1/organizations/usage/export",
        "read:usage",
        export_ledger,
        query=("starting_at", "ending_at", "format", "limit", "page"),
    ),
)
