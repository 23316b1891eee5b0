"""`/v1/organizations/credentials`: upstream credentials in the vault. Secrets go in; none ever comes out."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin import views
from claude_wrapper.api.admin.apikeys import Moment
from claude_wrapper.api.admin.http import AdminRoute, Asked, json, page
from claude_wrapper.api.credentials import presented
from claude_wrapper.broker.calls import CacheUse
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.vault import credentials as vault
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.probe import ProbeAnswer, probe
from claude_wrapper.vault.records import CredentialChange, CredentialSpec
from claude_wrapper.vault.resolve import Leased

_PROBED = "/v1/models?limit=1"


class NewCredential(msgspec.Struct, forbid_unknown_fields=True):
    """A credential to be kept. With `workspace_id` or `user_id` it serves those alone."""

    kind: str
    name: str
    secret: dict[str, str]
    config: dict[str, Any] = {}
    base_url: str | None = None
    workspace_id: str | None = None
    user_id: str | None = None
    rank: int = 0
    expires_at: Moment | None = None
    named_only: bool = False


class ChangedCredential(msgspec.Struct, forbid_unknown_fields=True):
    """What to change. A new base URL or configuration needs the secret again."""

    name: str | None = None
    secret: dict[str, str] | None = None
    config: dict[str, Any] | None = None
    base_url: str | None = None
    rank: int | None = None
    disabled: bool | None = None
    expires_at: Moment | None = None
    version: int | None = None


async def list_credentials(asked: Asked) -> Response:
    """List upstream credentials, newest first: never their secrets."""
    found = await asked.see(
        vault.list_credentials,
        asked.page(),
        workspace_id=asked.one("workspace_id"),
        user_id=asked.one("user_id"),
    )
    return page(found, views.credential)


async def create_credential(asked: Asked) -> Response:
    """Keep an upstream credential for the organisation, a workspace or a user."""
    body = await asked.body(NewCredential)
    tenants = asked.deps.tenants
    keys = await tenants.org_keys.of(asked.principal.org)
    spec = CredentialSpec(
        kind=parse_kind(body.kind),
        name=body.name,
        secret=body.secret,
        config=body.config,
        base_url=body.base_url,
        workspace=body.workspace_id or asked.principal.workspace,
        user=body.user_id,
        rank=body.rank,
        expires_at=body.expires_at,
        named_only=body.named_only,
    )

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await vault.create_credential(
            tx, asked.principal, asked.scribe, spec, keys=keys, rules=tenants.vault_rules
        )
        return views.credential(made)

    return await asked.create(work)


async def get_credential(asked: Asked) -> Response:
    """What may be shown of one upstream credential."""
    return json(views.credential(await asked.see(vault.get_credential, asked.path("credential_id"))))


async def update_credential(asked: Asked) -> Response:
    """Rename, disable, re-rank or replace the secret of an upstream credential."""
    body = await asked.body(ChangedCredential)
    tenants = asked.deps.tenants
    change = CredentialChange(
        name=body.name,
        secret=body.secret,
        config=body.config,
        base_url=body.base_url,
        rank=body.rank,
        disabled=body.disabled,
        expires_at=body.expires_at,
        expected_version=body.version,
    )
    keys = await tenants.org_keys.of(asked.principal.org)
    changed = await asked.do(
        vault.update_credential, asked.path("credential_id"), change, keys=keys, rules=tenants.vault_rules
    )
    return json(views.credential(changed))


async def delete_credential(asked: Asked) -> Response:
    """Delete an upstream credential for good."""
    credential_id = asked.path("credential_id")
    await asked.do(vault.delete_credential, credential_id)
    return json({"id": credential_id, "type": "credential_deleted"})


async def test_credential(asked: Asked) -> Response:
    """Ask the upstream for one model with this credential, and say whether it was let in."""
    # The resolver serves who runs turns; here somebody who may see it asks, so it is looked up as theirs.
    credential_id = asked.path("credential_id")
    await asked.see(vault.get_credential, credential_id)
    leased = await asked.deps.tenants.resolver.lease_for_test(asked.principal, credential_id)

    async def call(one: Leased) -> ProbeAnswer:
        shown = presented(one)
        answer = await asked.deps.direct.ask(shown, "GET", _PROBED, org=one.org, use=CacheUse.BYPASS)
        return ProbeAnswer(answer.status, _error_type(answer.body) if answer.status >= 400 else None)

    found = await probe(leased, call, asked.deps.clock)
    return json(
        {
            "type": "credential_test",
            "credential_id": found.credential_id,
            "validity": str(found.validity),
            "status": found.status,
            "message": found.message,
            "seconds": round(found.seconds, 3),
            "tested_at": found.probed_at,
        }
    )


def parse_kind(value: str) -> CredentialKind:
    """Raises InvalidRequest naming the field."""
    try:
        return CredentialKind(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(CredentialKind)}", field="kind") from None


def _error_type(body: bytes) -> str | None:
    try:
        found = msgspec.json.decode(body)
        return str(found["error"]["type"])[:100]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return None


_ALL = "/v1/organizations/credentials"
_ONE = _ALL + "/{credential_id}"

ROUTES = (
    AdminRoute(
        "GET",
        _ALL,
        "read:credentials",
        list_credentials,
        query=("limit", "after_id", "before_id", "workspace_id", "user_id"),
    ),
    AdminRoute("POST", _ALL, "write:credentials", create_credential, NewCredential),
    AdminRoute("GET", _ONE, "read:credentials", get_credential),
    AdminRoute("POST", _ONE, "write:credentials", update_credential, ChangedCredential),
    AdminRoute("DELETE", _ONE, "write:credentials", delete_credential),
    AdminRoute("POST", _ONE + "/test", "write:credentials", test_credential),
)
