"""`/v1/organizations/environment_keys`: the keys of self-hosted environments' workers. Ours: the real API has no call."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin.http import AdminRoute, Asked, json, page
from claude_wrapper.tenancy import environmentkeys
from claude_wrapper.tenancy.environmentkeys import READ, WRITE, EnvironmentKey

Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class NewEnvironmentKey(msgspec.Struct, forbid_unknown_fields=True):
    """A key to be made."""

    environment_id: str
    name: str = "worker"
    expires_at: Moment | None = None


async def list_keys(asked: Asked) -> Response:
    """List environment keys, newest first."""
    found = await asked.see(
        environmentkeys.list_environment_keys, asked.page(), environment_id=asked.one("environment_id")
    )
    return page(found, lambda one: _view(asked, one))


async def create_key(asked: Asked) -> Response:
    """Create an environment key; the answer is the only one that holds its secret."""
    body = await asked.body(NewEnvironmentKey)
    pepper = asked.deps.tenants.pepper

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await environmentkeys.create_environment_key(
            tx,
            asked.principal,
            asked.scribe,
            pepper,
            body.environment_id,
            name=body.name,
            expires_at=body.expires_at,
        )
        return {**_view(asked, made.key), "secret": made.secret}

    return await asked.create(work)


async def get_key(asked: Asked) -> Response:
    """One environment key, without its secret."""
    return json(_view(asked, await asked.see(environmentkeys.get_environment_key, asked.path("environment_key_id"))))


async def revoke_key(asked: Asked) -> Response:
    """Revoke an environment key for good."""
    found = await asked.do(environmentkeys.revoke_environment_key, asked.path("environment_key_id"))
    return json(_view(asked, found))


def _view(asked: Asked, one: EnvironmentKey) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "environment_key",
        "environment_id": one.environment_id,
        "name": one.name,
        "status": one.status(asked.scribe.now()),
        "partial_key_hint": one.hint,
        "created_by": one.created_by,
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "revoked_at": one.revoked_at,
    }


_ALL = "/v1/organizations/environment_keys"
_ONE = _ALL + "/{environment_key_id}"

ROUTES = (
    AdminRoute("GET", _ALL, READ, list_keys, query=("limit", "after_id", "before_id", "environment_id")),
    AdminRoute("POST", _ALL, WRITE, create_key, NewEnvironmentKey),
    AdminRoute("GET", _ONE, READ, get_key),
    AdminRoute("DELETE", _ONE, WRITE, revoke_key),
)
