"""OAuth tokens are refreshed in time, once, by one of many, and what upstream granted is never lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import ClientSession, web
from vault_doubles import ACCESS, REFRESH, RULES, Vault

from claude_wrapper.errors import CredentialMissing, StorageUnavailable, UpstreamUnavailable
from claude_wrapper.storage.tables.vault import vault_credentials
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.records import CredentialSpec, Status
from claude_wrapper.vault.resolve import Leased
from claude_wrapper.vault.tokens import Grant, HttpTokenEndpoint, Refused, TokenRequest

pytestmark = pytest.mark.anyio


async def lease(vault: Vault, named: str) -> Leased:
    return await vault.resolver.lease(vault.world.ours, named=named)


async def test_a_token_that_is_good_for_a_while_is_used_as_it_is(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours)
    assert (await lease(vault, made.id)).secret == ACCESS
    assert vault.endpoint.calls == []


async def test_a_token_is_refreshed_before_it_ends_and_its_owner_stays_the_same(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=200)
    leased = await lease(vault, made.id)
    assert (leased.id, leased.secret) == (made.id, "sk-ant-oat01-PLANTED-access-1")
    assert [call.refresh_token for call in vault.endpoint.calls] == [REFRESH]
    assert vault.endpoint.calls[0].client_id == "client-1"
    vault.clock.advance(3400)
    again = await lease(vault, made.id)
    assert (again.id, again.secret) == (made.id, "sk-ant-oat01-PLANTED-access-2")
    assert b"PLANTED" not in await vault.everything_stored()


async def test_many_requests_of_many_replicas_refresh_once(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=10)
    replicas = [vault.new_resolver(vault.new_refresher()) for _ in range(4)]
    leases = await asyncio.gather(
        *(replica.lease(vault.world.ours, named=made.id) for replica in replicas for _ in range(10))
    )
    assert len(vault.endpoint.calls) == 1
    assert {one.secret for one in leases} == {"sk-ant-oat01-PLANTED-access-1"}


async def test_the_callers_cancellation_does_not_lose_the_tokens(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=10)
    vault.endpoint.hold = asyncio.Event()
    asking = asyncio.create_task(lease(vault, made.id))
    async with asyncio.timeout(20):
        while not vault.endpoint.calls:
            await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    vault.endpoint.hold.set()
    await vault.refresher.close()
    vault.endpoint.hold = None
    assert (await vault.new_resolver(vault.new_refresher()).lease(vault.world.ours, named=made.id)).secret.endswith(
        "-1"
    )
    assert len(vault.endpoint.calls) == 1


async def test_tokens_that_could_not_be_written_serve_from_memory_and_are_written_later(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await vault.oauth(vault.world.ours, seconds=10)
    real = vault.db.run

    async def away(work: Any, **kw: Any) -> Any:
        raise StorageUnavailable("the database is away")

    monkeypatch.setattr(vault.db, "run", away)
    assert (await lease(vault, made.id)).secret.endswith("access-1")
    monkeypatch.setattr(vault.db, "run", real)
    assert (await lease(vault, made.id)).secret.endswith("access-1")
    fresh = vault.new_resolver(vault.new_refresher())
    assert (await fresh.lease(vault.world.ours, named=made.id)).secret.endswith("access-1")
    assert len(vault.endpoint.calls) == 1


async def test_a_refused_refresh_makes_the_credential_invalid_and_says_what_to_do(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=10)
    vault.endpoint.failure = Refused("invalid_grant")
    with pytest.raises(CredentialMissing, match="sign in again"):
        await lease(vault, made.id)
    with pytest.raises(CredentialMissing, match="invalid_grant"):
        await lease(vault, made.id)
    assert len(vault.endpoint.calls) == 1
    async with vault.db.read() as tx:
        assert await tx.scalar(sa.select(vault_credentials.c.status)) == Status.INVALID


async def test_an_endpoint_that_is_away_matters_only_once_the_token_has_ended(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=100)
    vault.endpoint.failure = UpstreamUnavailable("away")
    assert (await lease(vault, made.id)).secret == ACCESS
    vault.clock.advance(101)
    with pytest.raises(UpstreamUnavailable):
        await lease(vault, made.id)
    vault.endpoint.failure = None
    assert (await lease(vault, made.id)).secret.endswith("access-1")


async def test_a_replica_that_holds_the_refresh_and_hangs_does_not_hang_the_others(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=100)
    held = await vault.state.acquire(f"vault.oauth.{made.id}", "somebody", ttl=1000)
    assert held is not None
    assert (await lease(vault, made.id)).secret == ACCESS  # it is still good for 60 seconds
    vault.clock.advance(101)
    with pytest.raises(StorageUnavailable, match="another replica"):
        await lease(vault, made.id)
    await vault.state.release(held)
    assert (await lease(vault, made.id)).secret.endswith("access-1")


async def test_an_ended_token_without_a_refresh_token_or_a_client_is_a_clear_error(vault: Vault) -> None:
    alone = CredentialSpec(CredentialKind.OAUTH, "alone", {"access_token": ACCESS}, expires_at=vault.clock.now())
    made = await vault.create(vault.world.ours, alone)
    with pytest.raises(CredentialMissing, match="no refresh token"):
        await lease(vault, made.id)
    stranger = await vault.oauth(vault.world.ours, seconds=10)
    named = await vault.oauth(vault.world.ours, seconds=10, config={"client_id": "its-own"})
    resolver = vault.new_resolver(vault.new_refresher(client_id=None))
    assert (await resolver.lease(vault.world.ours, named=stranger.id)).secret == ACCESS
    vault.clock.advance(11)
    with pytest.raises(CredentialMissing, match="CLAUDE_WRAPPER_OAUTH_CLIENT_ID"):
        await resolver.lease(vault.world.ours, named=stranger.id)
    assert (await resolver.lease(vault.world.ours, named=named.id)).secret.endswith("access-1")
    assert [call.client_id for call in vault.endpoint.calls] == ["its-own"]


async def test_new_secrets_that_arrive_during_a_refresh_win(vault: Vault) -> None:
    from claude_wrapper.vault import credentials
    from claude_wrapper.vault.records import CredentialChange

    made = await vault.oauth(vault.world.ours, seconds=10)
    vault.endpoint.hold = asyncio.Event()
    asking = asyncio.create_task(lease(vault, made.id))
    async with asyncio.timeout(20):
        while not vault.endpoint.calls:
            await asyncio.sleep(0)
    change = CredentialChange(secret={"access_token": "sk-ant-oat01-PLANTED-by-hand"})
    keys = await vault.keys.of(vault.world.ours.org)
    await vault.world.do(credentials.update_credential, vault.world.ours, made.id, change, keys=keys, rules=RULES)
    vault.endpoint.hold.set()
    assert (await asking).secret == "sk-ant-oat01-PLANTED-by-hand"


# The endpoint over HTTP ------------------------------------------------------------------------------------------------


class Site:
    """An HTTP server on loopback that answers what it is told."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.seen: list[Any] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(await request.json())
        status, body = self.answers.pop(0)
        headers = {"location": "http://127.0.0.1:1/"} if 300 <= status < 400 else {}
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)


@pytest.fixture
async def site(anyio_backend: str) -> Any:
    made = Site()
    app = web.Application()
    app.router.add_post("/token", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    yield made
    await runner.cleanup()


async def ask(site: Site) -> Grant:
    async with ClientSession() as session:
        return await HttpTokenEndpoint(session, site.url, timeout=5).refresh(TokenRequest(REFRESH, "client-1"))


async def test_a_grant_over_http(site: Site) -> None:
    site.answers = [(200, b'{"access_token":"a","refresh_token":"r","expires_in":28800,"more":1}')]
    assert await ask(site) == Grant("a", "r", 28800)
    assert site.seen == [{"grant_type": "refresh_token", "refresh_token": REFRESH, "client_id": "client-1"}]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error":"invalid_grant","error_description":"sk-ant-ort01-PLANTED"}', Refused),
        (401, b'{"error":"invalid_client"}', Refused),
        (400, b'{"error":"slow_down"}', UpstreamUnavailable),
        (400, b'{"error":{"type":"x"}}', UpstreamUnavailable),
        (429, b"{}", UpstreamUnavailable),
        (500, b'{"error":"invalid_grant"}', UpstreamUnavailable),
        (302, b"", UpstreamUnavailable),
        (200, b"not json", UpstreamUnavailable),
        (200, b"[]", UpstreamUnavailable),
        (200, b'{"access_token":""}', UpstreamUnavailable),
        (200, b'{"access_token":"' + b"x" * 100_000 + b'"}', UpstreamUnavailable),
    ],
)
async def test_what_is_not_a_grant_is_told_apart_and_quotes_nothing(
    site: Site, status: int, body: bytes, error: type[Exception]
) -> None:
    site.answers = [(status, body)]
    with pytest.raises(error) as caught:
        await ask(site)
    assert "PLANTED" not in str(caught.value)
    assert len(site.seen) == 1


async def test_an_endpoint_that_does_not_exist_is_away() -> None:
    async with ClientSession() as session:
        with pytest.raises(UpstreamUnavailable, match="cannot be reached"):
            await HttpTokenEndpoint(session, "http://127.0.0.1:1/token").refresh(TokenRequest(REFRESH, "c"))
