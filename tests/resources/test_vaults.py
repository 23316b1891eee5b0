"""Vaults and credentials through the official SDK: secrets go in and never come out."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs

import anthropic
import pytest
import sqlalchemy as sa
from anthropic import AsyncAnthropic
from resources_world import KEYS, World

from claude_wrapper.errors import CredentialMissing
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions.resources.mcptokens import McpTokens
from claude_wrapper.sessions.resources.outward import Posted
from claude_wrapper.storage.tables.vault import vault_secrets

pytestmark = pytest.mark.anyio

URL = "https://mcp.example.com/mcp"
TOKENS = "https://auth.example.com/token"
BEARER = {"type": "static_bearer", "token": "PLANTED-bearer", "mcp_server_url": URL}
OAUTH: dict[str, Any] = {
    "type": "mcp_oauth",
    "access_token": "PLANTED-access-1",
    "mcp_server_url": URL,
    "refresh": {
        "client_id": "c1",
        "refresh_token": "PLANTED-refresh-1",
        "token_endpoint": TOKENS,
        "token_endpoint_auth": {"type": "client_secret_basic", "client_secret": "PLANTED:client secret"},
        "scope": "read",
    },
}
VARIABLE: dict[str, Any] = {
    "type": "environment_variable",
    "secret_name": "GITHUB_TOKEN",
    "secret_value": "PLANTED-value",
    "networking": {"type": "limited", "allowed_hosts": ["api.github.com"]},
}


def said(status: int, **body: Any) -> Posted:
    return Posted(status, "application/json", json.dumps(body).encode())


async def secrets_kept(world: World) -> int:
    async with world.means.db.read() as tx:
        return int((await tx.execute(sa.select(sa.func.count()).select_from(vault_secrets))).scalar() or 0)


async def test_vaults_live_and_end(client: AsyncAnthropic) -> None:
    vault = await client.beta.vaults.create(display_name="V", metadata={"a": "1"})
    assert (vault.type, vault.display_name, vault.archived_at) == ("vault", "V", None)
    changed = await client.beta.vaults.update(vault.id, display_name="W", metadata={"b": "2"})
    assert (changed.display_name, changed.metadata) == ("W", {"a": "1", "b": "2"})
    archived = await client.beta.vaults.archive(vault.id)
    assert archived.archived_at is not None
    assert [one.id async for one in client.beta.vaults.list()] == []
    assert [one.id async for one in client.beta.vaults.list(include_archived=True)] == [vault.id]
    with pytest.raises(anthropic.ConflictError):
        await client.beta.vaults.update(vault.id, display_name="X")
    with pytest.raises(anthropic.ConflictError):
        await client.beta.vaults.credentials.create(vault.id, auth=BEARER)
    gone = await client.beta.vaults.delete(vault.id)
    assert (gone.id, gone.type) == (vault.id, "vault_deleted")
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.vaults.retrieve(vault.id)


@pytest.mark.parametrize("auth", [BEARER, OAUTH, VARIABLE], ids=["bearer", "oauth", "variable"])
async def test_no_answer_and_no_row_holds_a_secret(world: World, auth: dict[str, Any]) -> None:
    client = world.client()
    vault = await client.beta.vaults.create(display_name="V")
    answers = [await client.beta.vaults.credentials.create(vault.id, auth=auth, display_name="D", metadata={"a": "1"})]
    made = answers[0]
    answers.append(await client.beta.vaults.credentials.retrieve(made.id, vault_id=vault.id))
    answers += [one async for one in client.beta.vaults.credentials.list(vault.id)]
    answers.append(
        await client.beta.vaults.credentials.update(
            made.id, vault_id=vault.id, display_name="E", auth=auth_change(auth)
        )
    )
    answers.append(await client.beta.vaults.credentials.archive(made.id, vault_id=vault.id))
    assert all("PLANTED" not in one.model_dump_json() for one in answers)
    assert (made.type, made.vault_id, made.display_name, made.auth.type) == (
        "vault_credential",
        vault.id,
        "D",
        auth["type"],
    )
    assert await secrets_kept(world) == 0  # archived: its secret is gone
    async with world.means.db.read() as tx:
        for table in ("tool_credentials", "audit_log"):
            rows = (await tx.execute(sa.text(f"SELECT * FROM {table}"))).all()
            assert rows
            assert "PLANTED" not in str(rows)


def auth_change(auth: dict[str, Any]) -> dict[str, Any]:
    field = {"static_bearer": "token", "mcp_oauth": "access_token", "environment_variable": "secret_value"}[
        auth["type"]
    ]
    return {"type": auth["type"], field: "PLANTED-changed"}


async def test_defaults_are_written_out(client: AsyncAnthropic) -> None:
    vault = await client.beta.vaults.create(display_name="V")
    variable = await client.beta.vaults.credentials.create(vault.id, auth=VARIABLE)
    assert variable.auth.injection_location.model_dump() == {"header": True, "body": False}
    oauth = await client.beta.vaults.credentials.create(vault.id, auth=OAUTH)
    assert oauth.auth.expires_at is None
    assert oauth.auth.refresh.token_endpoint_auth.type == "client_secret_basic"


async def test_what_cannot_change_is_refused(client: AsyncAnthropic) -> None:
    vault = await client.beta.vaults.create(display_name="V")
    bearer = await client.beta.vaults.credentials.create(vault.id, auth=BEARER)
    variable = await client.beta.vaults.credentials.create(vault.id, auth=VARIABLE)
    oauth = await client.beta.vaults.credentials.create(
        vault.id, auth=OAUTH | {"mcp_server_url": "https://b.example.com"}
    )
    refused = [
        (bearer, {"type": "mcp_oauth", "access_token": "x"}, "auth.type"),
        (bearer, {"type": "static_bearer", "mcp_server_url": "https://other.example.com"}, "auth.mcp_server_url"),
        (bearer, {"type": "static_bearer", "token": "a\r\nb"}, "auth.token"),
        (variable, {"type": "environment_variable", "secret_name": "OTHER"}, "auth.secret_name"),
        (
            variable,
            {"type": "environment_variable", "injection_location": {"header": False}},
            "auth.injection_location",
        ),
        (oauth, {"type": "mcp_oauth", "refresh": {"client_id": "c2"}}, "auth.refresh.client_id"),
        (oauth, {"type": "mcp_oauth", "expires_at": "2001-01-01T00:00:00Z"}, "auth.expires_at"),
    ]
    for one, auth, field in refused:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.beta.vaults.credentials.update(one.id, vault_id=vault.id, auth=auth)
        assert caught.value.body["error"]["param"] == field


async def test_bad_credentials_are_refused_by_their_path_and_leave_no_secret(
    world: World, client: AsyncAnthropic
) -> None:
    vault = await client.beta.vaults.create(display_name="V")
    for auth, field in [
        (None, "auth"),
        ({"type": "password"}, "auth.type"),
        ({**BEARER, "token": ""}, "auth.token"),
        ({**BEARER, "mcp_server_url": "mcp.example.com"}, "auth.mcp_server_url"),
        ({**OAUTH, "expires_at": "tomorrow"}, "auth.expires_at"),
        ({**OAUTH, "refresh": {**OAUTH["refresh"], "token_endpoint_auth": {"type": "client_secret_post"}}},
         "auth.refresh.token_endpoint_auth.client_secret"),
        ({**VARIABLE, "secret_name": "PATH"}, "auth.secret_name"),
        ({**VARIABLE, "secret_name": "ANTHROPIC_API_KEY"}, "auth.secret_name"),
        ({**VARIABLE, "secret_name": "A B"}, "auth.secret_name"),
        ({**VARIABLE, "networking": {"type": "limited", "allowed_hosts": []}}, "auth.networking.allowed_hosts"),
        ({**VARIABLE, "networking": {"type": "limited", "allowed_hosts": ["https://a.b"]}},
         "auth.networking.allowed_hosts[0]"),
        ({**VARIABLE, "networking": {"type": "limited", "allowed_hosts": [f"h{n}.com" for n in range(17)]}},
         "auth.networking.allowed_hosts"),
        ({**VARIABLE, "networking": None}, "auth.networking"),
    ]:  # fmt: skip
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.post(f"/v1/vaults/{vault.id}/credentials", body={"auth": auth}, cast_to=object)
        assert caught.value.body["error"]["param"] == field, auth
        assert "PLANTED" not in str(caught.value.body)
    assert await secrets_kept(world) == 0


async def test_one_credential_per_server_and_twenty_per_vault(world: World, client: AsyncAnthropic) -> None:
    vault = await client.beta.vaults.create(display_name="V")
    first = await client.beta.vaults.credentials.create(vault.id, auth=BEARER)
    for same in (URL, URL + "/", "https://MCP.example.com:443/mcp"):
        with pytest.raises(anthropic.ConflictError):
            await client.beta.vaults.credentials.create(vault.id, auth=OAUTH | {"mcp_server_url": same})
    await client.beta.vaults.credentials.archive(first.id, vault_id=vault.id)
    for number in range(20):
        auth = BEARER | {"mcp_server_url": f"https://mcp{number}.example.com"}
        await client.beta.vaults.credentials.create(vault.id, auth=auth)
    with pytest.raises(anthropic.ConflictError, match="20"):
        await client.beta.vaults.credentials.create(vault.id, auth=VARIABLE)
    assert await secrets_kept(world) == 20
    await client.beta.vaults.delete(vault.id)
    assert await secrets_kept(world) == 0


async def test_a_session_finds_the_credential_of_its_first_vault(world: World, client: AsyncAnthropic) -> None:
    one = await client.beta.vaults.create(display_name="1")
    two = await client.beta.vaults.create(display_name="2")
    await client.beta.vaults.credentials.create(two.id, auth=BEARER | {"token": "second"})
    acme = KEYS["acme"]
    found = await world.tokens.credential_for(acme, [one.id, two.id], URL + "/")
    assert await found.headers(refused=False) == {"authorization": "Bearer second"}
    await client.beta.vaults.credentials.create(one.id, auth=BEARER | {"token": "first"})
    found = await world.tokens.credential_for(acme, [one.id, two.id], URL)
    assert await found.headers(refused=False) == {"authorization": "Bearer first"}
    assert await found.headers(refused=True) == {}  # there is no other
    assert await world.tokens.credential_for(acme, [one.id], "https://other.example.com") is None
    assert await world.tokens.credential_for(KEYS["rival"], [one.id], URL) is None
    await client.beta.vaults.archive(one.id)
    found = await world.tokens.credential_for(acme, [one.id, two.id], URL)
    assert await found.headers(refused=False) == {"authorization": "Bearer second"}


async def oauth_credential(world: World, **change: Any) -> tuple[str, str]:
    client = world.client()
    vault = await client.beta.vaults.create(display_name="V")
    made = await client.beta.vaults.credentials.create(vault.id, auth=OAUTH | change)
    return vault.id, made.id


async def test_a_token_that_ends_is_refreshed_once_for_all_that_ask(world: World) -> None:
    vault_id, credential_id = await oauth_credential(world, expires_at="2026-01-01T00:10:00Z")
    found = await world.tokens.credential_for(KEYS["acme"], [vault_id], URL)
    assert await found.headers(refused=False) == {"authorization": "Bearer PLANTED-access-1"}
    assert world.outside.asked == []
    await world.clock.advance(600)
    world.outside.answers[TOKENS] = [said(200, access_token="a2", refresh_token="r2", expires_in=3600)]
    elsewhere = McpTokens(world.means, world.clock, world.leases, RandomIds())  # another replica
    theirs = await elsewhere.credential_for(KEYS["acme"], [vault_id], URL)
    asking = asyncio.gather(*(one.headers(refused=False) for one in (found, theirs, found, theirs, found)))
    async with asyncio.timeout(20):
        while not asking.done():
            await world.clock.advance(0.25)  # whoever is second looks again
            await asyncio.sleep(0.001)
    assert await asking == [{"authorization": "Bearer a2"}] * 5
    [(_, headers, body)] = world.outside.asked
    assert headers["authorization"].startswith("Basic ")
    assert parse_qs(body.decode()) == {
        "grant_type": ["refresh_token"],
        "refresh_token": ["PLANTED-refresh-1"],
        "scope": ["read"],
    }
    shown = await world.client().beta.vaults.credentials.retrieve(credential_id, vault_id=vault_id)
    assert shown.auth.expires_at > world.clock.now()
    # The next refresh uses what came with the last one.
    world.outside.answers[TOKENS] = [said(200, access_token="a3")]
    assert await found.headers(refused=True) == {"authorization": "Bearer a3"}
    assert parse_qs(world.outside.asked[1][2].decode())["refresh_token"] == ["r2"]


async def test_a_refresh_that_is_refused_says_so(world: World) -> None:
    vault_id, _ = await oauth_credential(world, expires_at="2026-01-01T00:10:00Z")
    found = await world.tokens.credential_for(KEYS["acme"], [vault_id], URL)
    await world.clock.advance(600)
    world.outside.answers[TOKENS] = [said(400, error="invalid_grant")]
    with pytest.raises(CredentialMissing, match="failed"):
        await found.headers(refused=False)


VALID = said(200, jsonrpc="2.0", id=1, result={})


@pytest.mark.parametrize(
    ("server", "endpoint", "status", "refresh"),
    [
        ([VALID], [], "valid", None),
        ([said(401), VALID], [said(200, access_token="a2")], "valid", "succeeded"),
        ([said(401, echo="PLANTED-access-1")], [said(400, error="invalid_grant")], "invalid", "failed"),
        ([said(401)], [], "unknown", "connect_error"),
        ([said(500)], [], "unknown", None),
        ([], [], "unknown", None),
    ],
)
async def test_validation(
    world: World, server: list[Posted], endpoint: list[Posted], status: str, refresh: str | None
) -> None:
    vault_id, credential_id = await oauth_credential(world)
    world.outside.answers = {URL: [*server], TOKENS: [*endpoint]}
    verdict = await world.client().beta.vaults.credentials.mcp_oauth_validate(credential_id, vault_id=vault_id)
    assert (verdict.status, verdict.has_refresh_token) == (status, True)
    assert (verdict.refresh.status if verdict.refresh else None) == refresh
    assert (verdict.mcp_probe is None) == (status == "valid")
    assert "PLANTED" not in verdict.model_dump_json()


async def test_only_oauth_credentials_are_validated(client: AsyncAnthropic) -> None:
    vault = await client.beta.vaults.create(display_name="V")
    made = await client.beta.vaults.credentials.create(vault.id, auth=BEARER)
    with pytest.raises(anthropic.BadRequestError, match="mcp_oauth"):
        await client.beta.vaults.credentials.mcp_oauth_validate(made.id, vault_id=vault.id)
