"""What an organisation owns outside of its rows, and how a purge erases it: processes, workspaces on disk, secrets."""

from __future__ import annotations

from dataclasses import dataclass

from claude_wrapper.api.state import Deps
from claude_wrapper.sessions.resources.erasing import BlobsOfResources
from claude_wrapper.tenancy.deletion import Eraser
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.erasure import erase_vault


def erasers(deps: Deps, principal: Principal) -> tuple[Eraser, ...]:
    """In the order in which they run: first what runs, then what lies on disk, then the keys that open the rest."""
    return (_Sessions(deps), BlobsOfResources(deps.resources.blobs), *deps.erasers, _Vault(deps, principal))


@dataclass
class _Sessions:
    """Ends the organisation's processes, whose workspaces go with them, and removes workspaces that were kept."""

    deps: Deps
    name: str = "sessions_on_this_server"

    async def erase(self, org: str) -> int:
        return await self.deps.conversations.erase(org)


@dataclass
class _Vault:
    """Credentials, other secrets and the data keys: what backups still hold cannot be opened without them."""

    deps: Deps
    principal: Principal
    name: str = "vault"

    async def erase(self, org: str) -> int:
        tenants = self.deps.tenants
        counts = await tenants.database.run(lambda tx: erase_vault(tx, self.principal), idempotent=True)
        tenants.org_keys.forget(org)
        return sum(counts.values())
