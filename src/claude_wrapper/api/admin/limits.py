"""Rate limits: `/v1/organizations/rate_limits` as in Anthropic's Admin API, and `/limits` for every scope (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin.apikeys import change_key
from claude_wrapper.api.admin.ceilings import limits_within, parse_scope
from claude_wrapper.api.admin.http import AdminRoute, Asked, json, sliced
from claude_wrapper.errors import InvalidRequest, NotFound, PermissionDenied
from claude_wrapper.limits import Limits, Rate, Resource, Scope
from claude_wrapper.limits.records import LimitRow, list_limits, set_limits
from claude_wrapper.limits.values import NO_LIMITS, PERIODS
from claude_wrapper.tenancy import apikeys
from claude_wrapper.tenancy.keyrecords import KeyChange
from claude_wrapper.tenancy.subjects import require_subject
from claude_wrapper.tenancy.workspaces import get_workspace

_GROUP: Final = {"type": "model_group", "id": "rlg_all", "display_name": "All models"}
"""Limits here are not per model: there is one group."""
_CACHE_AWARE: Final = "_cache_aware"
"""Tokens read from the cache do not count against the input limit; Anthropic's name for that."""
_UNIT_OF: Final = {seconds: name for name, seconds in PERIODS.items()}


class NewLimits(msgspec.Struct, forbid_unknown_fields=True):
    """All limits of one subject, as in `{"requests": "100/hour", "concurrent_turns": 4}`."""

    limits: dict[str, Any]
    version: int | None = None


class _Value(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    value: int | None


class ChangedRateLimits(msgspec.Struct, forbid_unknown_fields=True):
    """Limits to set; null takes one away."""

    limits: list[_Value]


# As in Anthropic's Admin API --------------------------------------------------------------------------------------------


async def list_rate_limits(asked: Asked) -> Response:
    """The organisation's rate limits in force."""
    org = asked.principal.org
    if asked.one("group_type") not in {None, "model_group"}:
        return sliced([], asked, str)
    rows = _by_subject(await asked.see(list_limits))
    limits = rows.get((Scope.ORGANIZATION, org), NO_LIMITS).over(_default(asked, Scope.ORGANIZATION))
    entry = {"id": _entry_id(org), "type": "rate_limit", "group": _GROUP, "limits": _values(limits), "models": None}
    return sliced([entry] if entry["limits"] else [], asked, lambda row: str(row["id"]))


async def list_workspace_rate_limits(asked: Asked) -> Response:
    """A workspace's rate limits; with `include_inherited` also the organisation's."""
    workspace = await asked.see(get_workspace, asked.path("workspace_id"))
    return sliced(
        await _workspace_entries(asked, workspace.id, inherited=asked.flag("include_inherited")),
        asked,
        lambda row: str(row["rate_limit_id"]),
    )


async def update_workspace_rate_limit(asked: Asked) -> Response:
    """Set or take away single rate limits of a workspace."""
    body = await asked.body(ChangedRateLimits)
    workspace = asked.path("workspace_id")
    if asked.path("rate_limit_id") != _entry_id(asked.principal.org):
        raise NotFound(f"there is no rate limit {asked.path('rate_limit_id')!r}")

    async def work(tx: AsyncConnection) -> None:
        await get_workspace(tx, asked.principal, workspace)
        rows = _by_subject(await list_limits(tx, asked.principal))
        before = rows.get((Scope.WORKSPACE, workspace), NO_LIMITS)
        after = limits_within(asked, Scope.WORKSPACE, merged(before, body.limits).to_json())
        await _store(tx, asked, Scope.WORKSPACE, workspace, before=before, after=Limits.parse(after))

    await asked.db.run(work)
    entries = await _workspace_entries(asked, workspace, inherited=False)
    return json(entries[0] if entries else _workspace_entry(asked, workspace, []))


async def _workspace_entries(asked: Asked, workspace: str, *, inherited: bool) -> list[dict[str, Any]]:
    rows = _by_subject(await asked.see(list_limits))
    org = rows.get((Scope.ORGANIZATION, asked.principal.org), NO_LIMITS).over(_default(asked, Scope.ORGANIZATION))
    above = {value["type"]: value["value"] for value in _values(org)}
    own = _values(rows.get((Scope.WORKSPACE, workspace), NO_LIMITS).over(_default(asked, Scope.WORKSPACE)))
    limits = [{**value, "org_limit": above.get(value["type"]), "source": {"type": "workspace"}} for value in own]
    if inherited:
        mine = {value["type"] for value in own}
        limits += [
            {"type": kind, "value": value, "org_limit": value, "source": {"type": "organization"}}
            for kind, value in above.items()
            if kind not in mine
        ]
    return [_workspace_entry(asked, workspace, limits)] if limits else []


def _workspace_entry(asked: Asked, workspace: str, limits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "type": "workspace_rate_limit",
        "workspace_id": workspace,
        "rate_limit_id": _entry_id(asked.principal.org),
        "group": _GROUP,
        "limits": limits,
        "models": None,
    }


def merged(before: Limits, changes: Sequence[_Value]) -> Limits:
    """`before` with single limits set or taken away. Pure; raises InvalidRequest naming the field."""
    entries: dict[Resource, Any] = dict(before.entries)
    for index, change in enumerate(changes):
        field = f"limits.{index}"
        name, per, unit = change.type.removesuffix(_CACHE_AWARE).partition("_per_")
        if name not in set(Resource) or (per and unit not in PERIODS):
            raise InvalidRequest(f"{change.type[:64]!r} is not limited here", field=f"{field}.type")
        resource = Resource(name)
        others = tuple(rate for rate in rates_of(entries, resource) if rate.period != PERIODS[unit]) if per else ()
        entries.pop(resource, None)
        if change.value is not None:
            text = f"{change.value}/{unit}" if per else change.value
            parsed = Limits.parse({name: text}, where=field).entries[resource]
            entries[resource] = (*others, *parsed) if isinstance(parsed, tuple) else parsed
        elif others:
            entries[resource] = others
    return Limits(entries)


def rates_of(entries: Mapping[Resource, Any], resource: Resource) -> tuple[Rate, ...]:
    """The rates of a resource; none for one that is lifted or absent."""
    value = entries.get(resource)
    return value if isinstance(value, tuple) else ()


def _values(limits: Limits) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for resource, value in limits.entries.items():
        if isinstance(value, int):
            found.append({"type": resource.value, "value": value})
        for rate in rates_of(limits.entries, resource):
            tail = _CACHE_AWARE if resource is Resource.INPUT_TOKENS else ""
            found.append({"type": f"{resource}_per_{_UNIT_OF[rate.period]}{tail}", "value": rate.limit})
    return found


def _entry_id(org: str) -> str:
    return f"rlim_{org.partition('_')[2]}"


# Ours: every scope ------------------------------------------------------------------------------------------------------


async def list_all_limits(asked: Asked) -> Response:
    """Limits of every key, user, workspace and of the organisation, and the server's defaults."""
    rows = [_view(row.scope, row.subject, row.limits, row.version) for row in await asked.see(list_limits)]
    settings = asked.deps.tenants.admission.settings
    scopes = (Scope.KEY, Scope.USER, Scope.WORKSPACE, Scope.ORGANIZATION)
    return json({"data": rows, "defaults": {scope.value: settings.default(scope).to_json() for scope in scopes}})


async def set_subject_limits(asked: Asked) -> Response:
    """Replace all limits of a key, user, workspace or of the organisation; none at all takes them away.

    The organisation's own are the operator's to set: they are what the operator allows.
    """
    body = await asked.body(NewLimits)
    scope, subject = parse_scope(asked.path("scope")), asked.path("subject_id")
    if scope is Scope.SESSION:
        raise InvalidRequest("a session has a budget, not limits", field="scope")
    if scope is Scope.ORGANIZATION and not asked.principal.is_operator:
        if subject != asked.principal.org:
            raise NotFound(f"there is no {scope} {subject!r}")
        raise PermissionDenied("the limits of a whole organisation are set by the operator of this server")
    limits = limits_within(asked, scope, body.limits)
    if scope is Scope.KEY:  # a key's limits are part of the key
        change = KeyChange(limits=limits, expected_version=body.version)
        key = await change_key(asked, subject, change)
        return json(_view(scope, subject, Limits.parse(key.limits), key.version))

    async def work(tx: AsyncConnection) -> LimitRow | None:
        await require_subject(tx, asked.principal, scope.value, subject)
        rows = _by_subject(await list_limits(tx, asked.principal))
        before, after = rows.get((scope, subject), NO_LIMITS), Limits.parse(limits)
        await _store(tx, asked, scope, subject, before=before, after=after, version=body.version)
        return next((row for row in await list_limits(tx, asked.principal) if row.subject == subject), None)

    row = await asked.db.run(work)
    return json(_view(scope, subject, Limits.parse(limits), row.version if row else 0))


async def get_subject_limits(asked: Asked) -> Response:
    """Limits of one key, user, workspace or of the organisation, as they were set."""
    scope, subject = parse_scope(asked.path("scope")), asked.path("subject_id")
    if scope is Scope.KEY:
        key = await asked.see(apikeys.get_api_key, subject, now=asked.scribe.now())
        return json(_view(scope, subject, Limits.parse(key.limits), key.version))
    await asked.see(require_subject, scope.value, subject)
    rows = [row for row in await asked.see(list_limits) if (row.scope, row.subject) == (scope, subject)]
    return json(_view(scope, subject, rows[0].limits if rows else NO_LIMITS, rows[0].version if rows else 0))


async def _store(
    tx: AsyncConnection,
    asked: Asked,
    scope: Scope,
    subject: str,
    *,
    before: Limits,
    after: Limits,
    version: int | None = None,
) -> None:
    await set_limits(tx, asked.principal, scope, subject, after, clock=asked.scribe.clock, expected_version=version)
    await asked.scribe.record(
        tx,
        asked.principal,
        "limits.update",
        (scope.value, subject),
        before={"limits": before.to_json()},
        after={"limits": after.to_json()},
    )


def _by_subject(rows: Sequence[LimitRow]) -> dict[tuple[Scope, str], Limits]:
    return {(row.scope, row.subject): row.limits for row in rows}


def _default(asked: Asked, scope: Scope) -> Limits:
    return asked.deps.tenants.admission.settings.default(scope)


def _view(scope: Scope, subject: str, limits: Limits, version: int) -> dict[str, Any]:
    return {
        "type": "limits",
        "scope": scope.value,
        "subject_id": subject,
        "limits": limits.to_json(),
        "version": version,
    }


_ORG = "/v1/organizations/rate_limits"
_WORKSPACE = "/v1/organizations/workspaces/{workspace_id}/rate_limits"
_ONE = "/v1/organizations/limits/{scope}/{subject_id}"

ROUTES = (
    AdminRoute("GET", _ORG, "read:limits", list_rate_limits, query=("limit", "page", "group_type", "model")),
    AdminRoute(
        "GET", _WORKSPACE, "read:limits", list_workspace_rate_limits, query=("limit", "page", "include_inherited")
    ),
    AdminRoute("POST", _WORKSPACE + "/{rate_limit_id}", "write:limits", update_workspace_rate_limit, ChangedRateLimits),
    AdminRoute("GET", "/v1/organizations/limits", "read:limits", list_all_limits),
    AdminRoute("GET", _ONE, "read:limits", get_subject_limits),
    AdminRoute("POST", _ONE, "write:limits", set_subject_limits, NewLimits),
)
