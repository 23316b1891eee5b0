"""The routes of resources over real HTTP, with two organisations and a few keys; no process, no pool."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import uvicorn
from anthropic import AsyncAnthropic
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from claude_wrapper.api import errors
from claude_wrapper.api.managed.resources import RESOURCE_ROUTES
from claude_wrapper.api.state import Deps
from claude_wrapper.errors import AuthenticationFailed, UpstreamUnavailable, WrapperError
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions.resources.mcptokens import McpTokens
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.outward import Posted
from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_directory
from claude_wrapper.storage.state.memory import MemoryState
from claude_wrapper.storage.tables.tenancy import organizations, workspaces
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.secretstore import SecretStore

ACME, RIVAL = "org_acme", "org_rival"
WORKSPACE = "wrkspc_one"


def principal(org: str, role: Role = Role.DEVELOPER, workspace: str | None = None) -> Principal:
    key = f"apikey_{org}_{role}_{workspace}"
    return Principal(org, workspace, ActorKind.API_KEY, key, None, role, scopes_of(role))


KEYS = {
    "acme": principal(ACME),
    "acme-viewer": principal(ACME, Role.VIEWER),
    "acme-billing": principal(ACME, Role.BILLING),
    "acme-workspace": principal(ACME, Role.DEVELOPER, WORKSPACE),
    "rival": principal(RIVAL),
}


@dataclass
class Outside:
    """What MCP servers and token endpoints answer, by URL; and what they were asked."""

    answers: dict[str, list[Posted]] = field(default_factory=dict)
    asked: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Posted:
        self.asked.append((url, headers, body))
        await asyncio.sleep(0)
        if not self.answers.get(url):
            raise UpstreamUnavailable("nobody there")
        return self.answers[url].pop(0)


@dataclass
class World:
    """A server and what is behind it."""

    url: str
    means: ResourceMeans
    tokens: McpTokens
    leases: MemoryState
    clock: ManualClock
    outside: Outside
    blobs: Path
    clients: list[AsyncAnthropic] = field(default_factory=list)

    def client(self, key: str = "acme") -> AsyncAnthropic:
        """The official SDK with this key."""
        client = AsyncAnthropic(base_url=self.url, api_key=key, max_retries=0)
        self.clients.append(client)
        return client

    def scribe(self) -> Scribe:
        return Scribe(self.clock, RandomIds())

    def stored(self) -> list[Path]:
        """The files that hold blobs."""
        return [path for path in self.blobs.rglob("*") if path.is_file()]


@contextlib.asynccontextmanager
async def resources_world(database: Database, directory: Path) -> AsyncIterator[World]:
    """Two organisations, a workspace, and a server on a free port."""
    clock, ids, outside = StepClock(), RandomIds(), Outside()
    async with database.transaction() as tx:
        for org in (ACME, RIVAL):
            await tx.execute(sa.insert(organizations).values(id=org, name=org, created_at=clock.now()))
        await tx.execute(sa.insert(workspaces).values(id=WORKSPACE, org_id=ACME, name="One", created_at=clock.now()))
    keys = OrgKeys(database, LocalMasterKey((KeyMaterial(bytes(32)),)), clock)
    secrets = SecretStore(database, keys, clock, ids)
    means = ResourceMeans(database, open_directory(directory / "blobs"), keys, secrets, outside)
    leases = MemoryState(clock)
    tokens = McpTokens(means, clock, leases, RandomIds())
    known: dict[str, Any] = {one.name: None for one in dataclasses.fields(Deps)}
    known |= {"settings": SimpleNamespace(max_body_bytes=8 * 2**20), "authenticate": _authenticate}
    known |= {"resources": means, "mcp_tokens": tokens, "clock": clock, "ids": ids}
    app = Starlette(
        routes=list(RESOURCE_ROUTES),
        exception_handlers={WrapperError: errors.on_wrapper_error, ClientDisconnect: _gone},
    )
    app.state.deps = Deps(**known)
    async with _serving(app) as url:
        world = World(url, means, tokens, leases, clock, outside, directory / "blobs")
        try:
            yield world
        finally:
            for client in world.clients:
                await client.close()


class StepClock(ManualClock):
    """Every look at the time is later than the last, so that rows have an order."""

    def now(self) -> datetime:
        self._now += timedelta(microseconds=1)
        return self._now


async def _authenticate(request: Request) -> Principal:
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key not in KEYS:
        raise AuthenticationFailed
    return KEYS[key]


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


@contextlib.asynccontextmanager
async def _serving(app: Any) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", access_log=False))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await serving
        listener.close()
