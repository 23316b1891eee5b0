"""Doubles of the KMS and of the token endpoint, and the vault put together for a test."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from claude_wrapper.storage.state import MemoryState
from claude_wrapper.storage.tables.tenancy import org_members, users, workspaces
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault import credentials
from claude_wrapper.vault.credentials import Rules
from claude_wrapper.vault.keys import KeyMaterial, KmsError, LocalMasterKey
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.oauth import OAuthRefresher, OAuthSettings
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.records import Credential, CredentialSpec
from claude_wrapper.vault.resolve import OperatorCredential, Resolver
from claude_wrapper.vault.tokens import Grant, TokenRequest
from tenants import World

PLANTED = "sk-ant-api03-PLANTED-0123456789abcdefghij"
ACCESS = "sk-ant-oat01-PLANTED-access-0"
REFRESH = "sk-ant-ort01-PLANTED-refresh-0"
RULES = Rules(allow_oauth=True)


def material(byte: int) -> KeyMaterial:
    return KeyMaterial(bytes([byte]) * 32)


class FakeKms:
    """Encrypts like a KMS would: under named keys that never leave it, with the context bound in."""

    def __init__(self, *keys: str) -> None:
        self.keys = LocalMasters({name: material(number + 1) for number, name in enumerate(keys)})
        self.away = False
        self.calls = 0

    async def encrypt(self, key: str, plain: bytes, context: bytes) -> bytes:
        return (await self._of(key).wrap(plain, context)).blob

    async def decrypt(self, key: str, blob: bytes, context: bytes) -> bytes:
        from claude_wrapper.errors import VaultSealed
        from claude_wrapper.vault.keys import Wrapped

        inner = self._of(key)
        try:
            return await inner.unwrap(Wrapped(inner.primary, blob), context)
        except VaultSealed as error:
            raise KmsError("InvalidCiphertextException") from error

    def _of(self, key: str) -> LocalMasterKey:
        self.calls += 1
        if self.away:
            raise ConnectionError("kms")
        if key not in self.keys.by_name:
            raise KmsError("NotFoundException")
        return self.keys.by_name[key]


class LocalMasters:
    def __init__(self, keys: dict[str, KeyMaterial]) -> None:
        self.by_name = {name: LocalMasterKey([key]) for name, key in keys.items()}


@dataclass
class ScriptedEndpoint:
    """A token endpoint that rotates refresh tokens: each one works once."""

    lifetime: float = 3600
    calls: list[TokenRequest] = field(default_factory=list)
    spent: set[str] = field(default_factory=set)
    failure: Exception | None = None
    hold: asyncio.Event | None = None

    async def refresh(self, request: TokenRequest) -> Grant:
        from claude_wrapper.vault.tokens import Refused

        self.calls.append(request)
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        if request.refresh_token in self.spent:
            raise Refused("invalid_grant")
        self.spent.add(request.refresh_token)
        number = len(self.spent)
        return Grant(f"sk-ant-oat01-PLANTED-access-{number}", f"sk-ant-ort01-PLANTED-refresh-{number}", self.lifetime)


class Vault:
    """The parts of the vault over a test's world, and short ways to use them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.db = world.db
        self.clock = world.clock
        self.master = LocalMasterKey([material(7)])
        self.keys = self.new_keys()
        self.endpoint = ScriptedEndpoint()
        self.state = MemoryState(self.clock)
        self.refresher = self.new_refresher()
        self.resolver = self.new_resolver(self.refresher)
        self.db.listener = self._listen

    async def _listen(self, announcements: Any) -> None:
        self.resolver.heard(announcements)

    def new_keys(self, master: LocalMasterKey | None = None) -> OrgKeys:
        return OrgKeys(self.db, master or self.master, self.clock)

    def new_refresher(self, state: Any = None, *, client_id: str | None = "client-1") -> OAuthRefresher:
        settings = OAuthSettings(client_id=client_id)
        return OAuthRefresher(
            self.db, self.new_keys(), state or self.state, self.endpoint,
            clock=self.clock, ids=self.world.scribe.ids, settings=settings,
        )  # fmt: skip

    def new_resolver(self, refresher: OAuthRefresher, *, operator: bool = True) -> Resolver:
        own = OperatorCredential("sk-ant-api03-OPERATOR-PLANTED") if operator else None
        return Resolver(self.db, self.keys, self.clock, refresher=refresher, operator=own)

    async def create(
        self, principal: Principal, spec: CredentialSpec | None = None, *, rules: Rules = RULES, **changed: Any
    ) -> Credential:
        spec = spec or replace(CredentialSpec(CredentialKind.API_KEY, "main", {"api_key": PLANTED}), **changed)
        keys = await self.keys.of(principal.org)
        made: Credential = await self.world.do(credentials.create_credential, principal, spec, keys=keys, rules=rules)
        return made

    async def oauth(self, principal: Principal, *, seconds: float = 3600, **changed: Any) -> Credential:
        from datetime import timedelta

        ends = self.clock.now() + timedelta(seconds=seconds)
        secret = {"access_token": ACCESS, "refresh_token": REFRESH}
        return await self.create(
            principal, CredentialSpec(CredentialKind.OAUTH, "mine", secret, expires_at=ends, **changed)
        )

    async def add_workspace(self, principal: Principal, name: str) -> str:
        return await self._insert(workspaces, id=f"wrkspc_{name}", org_id=principal.org, name=name)

    async def add_user(self, principal: Principal, name: str) -> str:
        user = await self._insert(users, id=f"user_{name}", email=f"{name}@example.com", name=name)
        now = self.clock.now()
        async with self.db.transaction() as tx:
            await tx.execute(
                sa.insert(org_members).values(org_id=principal.org, user_id=user, role="developer", added_at=now)
            )
        return user

    async def _insert(self, table: sa.Table, **values: Any) -> str:
        async with self.db.transaction() as tx:
            await tx.execute(sa.insert(table).values(created_at=self.clock.now(), **values))
        return str(values["id"])

    async def everything_stored(self) -> bytes:
        """All bytes of all rows of all tables; on SQLite the file and its log as well."""
        from claude_wrapper.storage.schema import metadata

        found = b""
        async with self.db.read() as tx:
            for table in metadata.sorted_tables:
                for row in await tx.execute(sa.select(table)):
                    for value in row:
                        found += value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
        if self.db.dialect == "sqlite":
            from pathlib import Path

            path = Path(str(make_url(self.db.url).database))
            found += path.read_bytes()
            log = path.with_name(path.name + "-wal")
            found += log.read_bytes() if log.exists() else b""
        return found
