"""`/v1/organizations/api_keys`: list, read and change as in Anthropic's Admin API; creation and rotation are ours."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin import views
from claude_wrapper.api.admin.ceilings import limits_within
from claude_wrapper.api.admin.http import AdminRoute, Asked, json, page
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits import CHANNEL, Scope
from claude_wrapper.storage.engine import announce
from claude_wrapper.tenancy import apikeys
from claude_wrapper.tenancy.keyrecords import KeyChange, KeySpec, KeyStatus, NewApiKey
from claude_wrapper.tenancy.scopes import parse_role

Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """A key to be made."""

    name: str
    role: str = "developer"
    workspace_id: str | None = None
    user_id: str | None = None
    scopes: list[str] | None = None
    allowed_models: list[str] | None = None
    limits: dict[str, Any] = {}
    expires_at: Moment | None = None


class ChangedKey(msgspec.Struct, forbid_unknown_fields=True):
    """What to change of a key; what is absent or null stays."""

    name: str | None = None
    status: str | None = None
    scopes: list[str] | None = None
    allowed_models: list[str] | None = None
    limits: dict[str, Any] | None = None
    expires_at: Moment | None = None
    version: int | None = None


class Rotation(msgspec.Struct, forbid_unknown_fields=True):
    """How long the old key stays good beside the new one."""

    overlap_seconds: int = 0


async def list_keys(asked: Asked) -> Response:
    """List API keys, newest first."""
    status = asked.one("status")
    found = await asked.see(
        apikeys.list_api_keys,
        asked.page(),
        now=asked.scribe.now(),
        status=None if status is None else parse_status(status),
        workspace_id=asked.one("workspace_id"),
        created_by_user_id=asked.one("created_by_user_id"),
    )
    return page(found, views.api_key)


async def create_key(asked: Asked) -> Response:
    """Create an API key; the answer is the only one that holds its secret."""
    body = await asked.body(NewKey)
    spec = KeySpec(
        name=body.name,
        role=parse_role(body.role),
        workspace_id=body.workspace_id,
        user_id=body.user_id,
        scopes=body.scopes,
        allowed_models=body.allowed_models,
        limits=limits_within(asked, Scope.KEY, body.limits),
        expires_at=body.expires_at,
    )
    pepper = asked.deps.tenants.pepper

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await apikeys.create_api_key(tx, asked.principal, asked.scribe, pepper, spec)
        if spec.limits:
            announce(tx, CHANNEL, asked.principal.org.encode())
        return _with_secret(made)

    return await asked.create(work)


async def get_key(asked: Asked) -> Response:
    """One API key, without its secret."""
    found = await asked.see(apikeys.get_api_key, asked.path("api_key_id"), now=asked.scribe.now())
    return json(views.api_key(found))


async def update_key(asked: Asked) -> Response:
    """Rename, disable, narrow or revoke (`archived`) an API key."""
    body = await asked.body(ChangedKey)
    limits: Mapping[str, Any] | None = None
    if body.limits is not None:
        asked.principal.require("write:limits")  # or whoever may make keys could lift what an admin set
        limits = limits_within(asked, Scope.KEY, body.limits)
    change = KeyChange(
        name=body.name,
        status=None if body.status is None else parse_status(body.status),
        scopes=body.scopes,
        allowed_models=body.allowed_models,
        limits=limits,
        expires_at=body.expires_at,
        expected_version=body.version,
    )
    return json(views.api_key(await change_key(asked, asked.path("api_key_id"), change)))


async def change_key(asked: Asked, key_id: str, change: KeyChange) -> Any:
    """Change a key and let the rate limits know."""

    async def work(tx: AsyncConnection) -> Any:
        changed = await apikeys.update_api_key(tx, asked.principal, asked.scribe, key_id, change)
        if change.limits is not None:
            announce(tx, CHANNEL, asked.principal.org.encode())
        return changed

    return await asked.db.run(work)


async def rotate_key(asked: Asked) -> Response:
    """Replace an API key; both are good for `overlap_seconds` (at most 30 days)."""
    body = await asked.body(Rotation)
    if not 0 <= body.overlap_seconds <= apikeys.MAX_OVERLAP.total_seconds():
        raise InvalidRequest(f"must be from 0 to {apikeys.MAX_OVERLAP.days} days", field="overlap_seconds")
    overlap, pepper = timedelta(seconds=body.overlap_seconds), asked.deps.tenants.pepper

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await apikeys.rotate_api_key(
            tx, asked.principal, asked.scribe, pepper, asked.path("api_key_id"), overlap=overlap
        )
        if made.key.limits:
            announce(tx, CHANNEL, asked.principal.org.encode())
        return _with_secret(made)

    return await asked.create(work)


def _with_secret(made: NewApiKey) -> dict[str, Any]:
    return {**views.api_key(made.key), "secret": made.secret}


def parse_status(value: str) -> KeyStatus:
    """Raises InvalidRequest naming the field."""
    try:
        return KeyStatus(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(KeyStatus)}", field="status") from None


_ONE = "/v1/organizations/api_keys/{api_key_id}"
_LIST = ("limit", "after_id", "before_id", "status", "workspace_id", "created_by_user_id")

ROUTES = (
    AdminRoute("GET", "/v1/organizations/api_keys", "read:api_keys", list_keys, query=_LIST),
    AdminRoute("POST", "/v1/organizations/api_keys", "write:api_keys", create_key, NewKey),
    AdminRoute("GET", _ONE, "read:api_keys", get_key),
    AdminRoute("POST", _ONE, "write:api_keys", update_key, ChangedKey),
    AdminRoute("POST", _ONE + "/rotate", "write:api_keys", rotate_key, Rotation),
)
