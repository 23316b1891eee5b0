"""`/v1/mcp`: the remote MCP servers of the caller's agents and sessions, and trying one out. Ours, not the API's."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, get, post
from claude_wrapper.api.translate import owner_of
from claude_wrapper.sessions.managed import WRITE
from claude_wrapper.sessions.mcpprobe import probe
from claude_wrapper.sessions.mcpservers import RemoteSpec
from claude_wrapper.sessions.resources.credentials import require_usable
from claude_wrapper.sessions.resources.toolauth import MAX_SECRET
from claude_wrapper.sessions.resources.values import Fields, id_of, url_of
from claude_wrapper.sessions.serverbook import list_servers
from claude_wrapper.sessions.sessionfields import MAX_VAULTS
from claude_wrapper.storage.pagination import Page
from claude_wrapper.wire.extensions import check_headers

_PROBE: Final = ("url", "transport", "headers", "authorization_token", "vault_ids")


async def mcp_servers(call: Call) -> Response:
    """The remote MCP servers that agents and sessions have named, each with its last status."""

    async def work(tx: AsyncConnection) -> Page[dict[str, Any]]:
        return await list_servers(tx, call.principal, call.query.page())

    found = await call.read(work)
    return answer({"data": list(found.data), "next_page": found.next_page})


async def probe_mcp_server(call: Call) -> Response:
    """Try a remote MCP server: reachable or not, its credential, its protocol version and tools."""
    call.principal.require(WRITE)
    fields = (await call.fields()).only(*_PROBE)
    spec = _spec(fields)
    if spec.vault_ids:

        async def work(tx: AsyncConnection) -> None:
            await require_usable(tx, call.principal, spec.vault_ids, "vault_ids")

        await call.read(work)
    # It holds a connection for seconds: it counts against the caller's limits while it lasts.
    async with call.deps.tenants.admission.admit(call.principal):
        return answer(await probe(call.deps.remotes, owner_of(call.principal), spec))


def _spec(fields: Fields) -> RemoteSpec:
    """The server as a request of `/v1/messages` would name it, with vaults as a session does."""
    url = url_of(fields.data.get("url"), fields.at("url"))
    legacy = fields.given("transport") and fields.one_of("transport", "http", "sse") == "sse"
    vaults = tuple(id_of(one, path, "vlt") for one, path in fields.items("vault_ids", most=MAX_VAULTS))
    given = fields.maybe_object("headers")
    headers = {} if given is None else {name: given.text(name, most=MAX_SECRET) for name in given.data}
    if fields.given("authorization_token"):
        headers["Authorization"] = f"Bearer {fields.text('authorization_token', most=MAX_SECRET)}"
    return RemoteSpec("probe", url, check_headers(headers, "headers"), vaults, legacy=legacy)


ROUTES: Final[tuple[Route, ...]] = (
    get("/v1/mcp/servers", mcp_servers),
    post("/v1/mcp/probe", probe_mcp_server),
)
