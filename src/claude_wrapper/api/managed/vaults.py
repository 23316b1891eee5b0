"""`/v1/vaults` and the credentials in them. No answer holds a secret."""

from __future__ import annotations

from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, delete, get, page_answer, post
from claude_wrapper.sessions.resources import credentials, vaults
from claude_wrapper.sessions.resources.credentials import ToolCredential
from claude_wrapper.sessions.resources.vaults import Vault
from claude_wrapper.storage.pagination import Page


def _vault(call: Call) -> str:
    return call.id("vault_id", "vault")


def _place(call: Call) -> tuple[str, str]:
    return _vault(call), call.id("credential_id", "credential")


async def create_vault(call: Call) -> Response:
    """A new vault."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Vault:
        return await vaults.create_vault(tx, call.principal, call.scribe, fields)

    return answer((await call.write(work)).to_wire())


async def get_vault(call: Call) -> Response:
    """One vault."""

    async def work(tx: AsyncConnection) -> Vault:
        return await vaults.get_vault(tx, call.principal, _vault(call))

    return answer((await call.read(work)).to_wire())


async def list_vaults(call: Call) -> Response:
    """A page of vaults."""

    async def work(tx: AsyncConnection) -> Page[Vault]:
        archived = call.query.boolean("include_archived")
        return await vaults.list_vaults(tx, call.principal, call.query.page(), include_archived=archived)

    return page_answer(await call.read(work))


async def update_vault(call: Call) -> Response:
    """Change a vault."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Vault:
        return await vaults.update_vault(tx, call.principal, call.scribe, _vault(call), fields)

    return answer((await call.write(work)).to_wire())


async def archive_vault(call: Call) -> Response:
    """Archive a vault with its credentials."""
    return answer((await credentials.archive_vault(call.means, call.principal, call.scribe, _vault(call))).to_wire())


async def delete_vault(call: Call) -> Response:
    """Delete a vault with its credentials."""
    vault_id = _vault(call)
    await credentials.delete_vault(call.means, call.principal, call.scribe, vault_id)
    return answer({"id": vault_id, "type": "vault_deleted"})


async def create_credential(call: Call) -> Response:
    """A new credential."""
    fields = await call.fields()
    made = await credentials.create_credential(call.means, call.principal, call.scribe, _vault(call), fields)
    return answer(made.to_wire())


async def get_credential(call: Call) -> Response:
    """One credential."""

    async def work(tx: AsyncConnection) -> ToolCredential:
        return await credentials.get_credential(tx, call.principal, *_place(call))

    return answer((await call.read(work)).to_wire())


async def list_credentials(call: Call) -> Response:
    """A page of a vault's credentials."""

    async def work(tx: AsyncConnection) -> Page[ToolCredential]:
        archived = call.query.boolean("include_archived")
        return await credentials.list_credentials(
            tx, call.principal, call.query.page(), _vault(call), include_archived=archived
        )

    return page_answer(await call.read(work))


async def update_credential(call: Call) -> Response:
    """Change a credential."""
    fields = await call.fields()
    changed = await credentials.update_credential(call.means, call.principal, call.scribe, _place(call), fields)
    return answer(changed.to_wire())


async def archive_credential(call: Call) -> Response:
    """Archive a credential."""
    archived = await credentials.archive_credential(call.means, call.principal, call.scribe, _place(call))
    return answer(archived.to_wire())


async def delete_credential(call: Call) -> Response:
    """Delete a credential."""
    place = _place(call)
    await credentials.delete_credential(call.means, call.principal, call.scribe, place)
    return answer({"id": place[1], "type": "vault_credential_deleted"})


async def validate_credential(call: Call) -> Response:
    """Try a credential at its MCP server."""
    return answer(await call.deps.mcp_tokens.validate(call.principal, *_place(call)))


_ONE: Final = "/v1/vaults/{vault_id}"
_CREDENTIAL: Final = _ONE + "/credentials/{credential_id}"

ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/vaults", create_vault),
    get("/v1/vaults", list_vaults),
    get(_ONE, get_vault),
    post(_ONE, update_vault),
    delete(_ONE, delete_vault),
    post(_ONE + "/archive", archive_vault),
    post(_ONE + "/credentials", create_credential),
    get(_ONE + "/credentials", list_credentials),
    get(_CREDENTIAL, get_credential),
    post(_CREDENTIAL, update_credential),
    delete(_CREDENTIAL, delete_credential),
    post(_CREDENTIAL + "/archive", archive_credential),
    post(_CREDENTIAL + "/mcp_oauth_validate", validate_credential),
)
