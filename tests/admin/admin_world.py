"""Two organisations on a running server, and everybody who may ask something of it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from claude_wrapper.tenancy.apikeys import create_api_key
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.keyrecords import KeySpec
from claude_wrapper.tenancy.orgs import create_organization
from claude_wrapper.tenancy.principal import operator
from claude_wrapper.tenancy.scopes import Role
from running_server import KEY, Running

ROOT = "/v1/organizations"


@dataclass
class Reply:
    """An answer, read."""

    status: int
    headers: dict[str, str]
    body: Any
    raw: bytes

    @property
    def error(self) -> str:
        return str(self.body["error"]["message"])


@dataclass
class Admin:
    """The server and what a test needs to speak with it."""

    server: Running
    ours: str
    theirs: str
    owner: str
    """A key of our organisation's owner."""
    their_owner: str

    @classmethod
    async def made(cls, server: Running) -> Admin:
        deps = server.server.app.state.deps
        tenants, scribe = deps.tenants, Scribe(deps.clock, deps.ids)
        async with tenants.database.transaction() as tx:
            orgs, keys = [], []
            for name in ("Ours", "Theirs"):
                org = await create_organization(tx, operator(), scribe, name)
                inside = operator().acting_in(org.id)
                made = await create_api_key(tx, inside, scribe, tenants.pepper, KeySpec("owner", Role.OWNER))
                orgs.append(org.id)
                keys.append(made.secret)
        return cls(server, orgs[0], orgs[1], keys[0], keys[1])

    async def key(self, role: str, **fields: Any) -> str:
        """A new key of our organisation with this role."""
        made = await self.post("/api_keys", {"name": role, "role": role, **fields})
        assert made.status == 200, made.body
        return str(made.body["secret"])

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """`path` is below `/v1/organizations` unless it begins with `/v1`. The key is our owner's unless another is given."""
        url = path if path.startswith(("/v1", "/health")) else ROOT + path
        sent = {"authorization": f"Bearer {key or self.owner}", "content-type": "application/json", **(headers or {})}
        data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.server.http.request(method, url, data=data, headers=sent) as response:
            raw = await response.read()
            is_json = response.content_type == "application/json"
            sent_back = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, sent_back, json.loads(raw) if is_json and raw else None, raw)

    async def get(self, path: str, **kw: Any) -> Reply:
        return await self.call("GET", path, **kw)

    async def post(self, path: str, body: Any = None, **kw: Any) -> Reply:
        return await self.call("POST", path, body, **kw)

    async def delete(self, path: str, **kw: Any) -> Reply:
        return await self.call("DELETE", path, **kw)

    def as_operator(self, org: str | None = None) -> dict[str, Any]:
        """Keyword arguments of `call` for the operator, acting in an organisation."""
        return {"key": KEY, "headers": {"cw-organization": org} if org else {}}
