"""Tokens for MCP servers out of a session's vaults: found by URL, refreshed when they end, tried out on request."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import quote_plus, urlencode
from weakref import WeakValueDictionary

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
    Conflict,
    CredentialMissing,
    InvalidRequest,
    PermissionDenied,
    StorageUnavailable,
    UpstreamUnavailable,
)
from claude_wrapper.ids import Ids
from claude_wrapper.sessions.resources.credentials import (
    ToolCredential,
    get_credential,
    read_secret,
    usable_credentials,
    write_secret,
)
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.outward import Posted
from claude_wrapper.sessions.resources.toolauth import MCP_OAUTH, STATIC_BEARER, plain_url
from claude_wrapper.sessions.resources.values import time_of, wire_time
from claude_wrapper.storage.state.ports import Leases
from claude_wrapper.storage.tables.resources import tool_credentials
from claude_wrapper.tenancy.principal import Principal, owned

MARGIN: Final = timedelta(seconds=60)
"""A token that ends sooner is refreshed before it is used."""
_SHOWN_BODY: Final = 2_000
_LEASE: Final = 30.0
"""Seconds that one replica may take: longer than the way out waits for a token endpoint."""
_WAIT: Final = 40.0
_POLL: Final = 0.25
_PROTOCOL: Final = "2025-06-18"
INITIALIZE: Final[Mapping[str, Any]] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": _PROTOCOL,
        "capabilities": {},
        "clientInfo": {"name": "claude-wrapper", "version": "1"},
    },
}


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What became of a refresh."""

    status: str
    """`succeeded`, `failed`, `connect_error` or `no_refresh_token`."""
    answer: Posted | None = None
    token: str | None = field(default=None, repr=False)


class McpTokens:
    """One per server process. Refreshes of one credential happen one after the other, on whichever replica: refresh
    tokens rotate, and a second use of one may end them all."""

    def __init__(self, means: ResourceMeans, clock: Clock, leases: Leases, ids: Ids) -> None:
        self._means = means
        self._clock = clock
        self._leases = leases
        self._ids = ids
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Future[Refreshed]] = set()

    async def credential_for(
        self, principal: Principal, vault_ids: Sequence[str], url: str
    ) -> StoredMcpCredential | None:
        """The credential of the first vault that has one for this MCP server; None: ask without. Needs `read:vaults`.

        What it returns gives `headers(refused=…)`, as the broker's MCP client asks for them.
        """
        kinds = (STATIC_BEARER, MCP_OAUTH)

        async def read(tx: AsyncConnection) -> list[ToolCredential]:
            return await usable_credentials(tx, principal, vault_ids, kinds, plain_url(url))

        found = await self._means.db.query(read) if vault_ids else []
        return StoredMcpCredential(self, principal, found[0]) if found else None

    async def token(self, principal: Principal, credential: ToolCredential, *, refused: str | None = None) -> str:
        """A token that is good now. `refused` is one that the server did not take.

        Raises CredentialMissing when there is no other, NotFound when the credential was deleted meanwhile.
        """
        secret, _ = await read_secret(self._means, principal, credential)
        if credential.kind == STATIC_BEARER:
            if secret["token"] == refused:
                raise CredentialMissing(f"the MCP server does not take the token of credential {credential.id!r}")
            return str(secret["token"])
        if secret["access_token"] != refused and not await self._ends_soon(principal, credential):
            return str(secret["access_token"])
        refreshed = await self.refresh(principal, credential, refused or str(secret["access_token"]))
        if refreshed.token is None:
            if refreshed.status == "no_refresh_token" and refused is None:
                return str(secret["access_token"])  # its stated end may be wrong: the server decides
            raise CredentialMissing(
                f"the token of credential {credential.id!r} has ended and could not be refreshed: {refreshed.status}"
            )
        return refreshed.token

    async def refresh(self, principal: Principal, credential: ToolCredential, spent: str) -> Refreshed:
        """A new access token in place of `spent`, unless somebody got one meanwhile."""
        turn = self._turns.setdefault(credential.id, asyncio.Lock())
        async with turn:
            secret, _ = await read_secret(self._means, principal, credential)
            if secret["access_token"] != spent:
                return Refreshed("succeeded", token=secret["access_token"])
            if "refresh_token" not in secret:
                return Refreshed("no_refresh_token")
            # Not cancelled half-way: a refresh token that was spent must not be lost with its successor.
            work = asyncio.ensure_future(self._alone(principal, credential, spent))
            self._running.add(work)
            work.add_done_callback(self._running.discard)
            return await asyncio.shield(work)

    async def validate(self, principal: Principal, vault_id: str, credential_id: str) -> dict[str, Any]:
        """Try an `mcp_oauth` credential at its server, with a refresh on a 401; the API's validation object."""
        principal.require("write:vaults")

        async def read(tx: AsyncConnection) -> ToolCredential:
            return await get_credential(tx, principal, vault_id, credential_id)

        credential = await self._means.db.query(read)
        if credential.kind != MCP_OAUTH:
            raise InvalidRequest(f"this needs a credential of type {MCP_OAUTH}; it is {credential.kind}")
        if credential.archived_at is not None:
            raise Conflict(f"credential {credential_id!r} is archived")
        secret, _ = await read_secret(self._means, principal, credential)
        token = str(secret["access_token"])
        verdict, posted = await self._probe(credential, token)
        refreshed: Refreshed | None = None
        if posted is not None and posted.status == 401:
            refreshed = await self.refresh(principal, credential, token)
            if refreshed.token is not None:
                token = refreshed.token
                verdict, posted = await self._probe(credential, token)
            elif refreshed.status == "connect_error":
                verdict = "unknown"
        hidden = (*secret.values(), token)
        probe = {"method": "initialize", "http_response": _shown(posted, hidden)} if verdict != "valid" else None
        return {
            "type": "vault_credential_validation",
            "credential_id": credential_id,
            "vault_id": vault_id,
            "status": verdict,
            "has_refresh_token": "refresh_token" in secret,
            "mcp_probe": probe,
            "refresh": None
            if refreshed is None
            else {"status": refreshed.status, "http_response": _shown(refreshed.answer, hidden)},
            "validated_at": wire_time(self._clock.now()),
        }

    # inside ------------------------------------------------------------------------------------------------------------

    async def _ends_soon(self, principal: Principal, credential: ToolCredential) -> bool:
        async def read(tx: AsyncConnection) -> ToolCredential:
            return await get_credential(tx, principal, credential.vault_id, credential.id)

        ends = (await self._means.db.query(read)).auth["expires_at"]
        return ends is not None and time_of(ends, "expires_at") <= self._clock.now() + MARGIN

    async def _alone(self, principal: Principal, credential: ToolCredential, spent: str) -> Refreshed:
        """The refresh, while no other replica makes one; what another has just got is taken instead."""
        name, holder = f"mcp.oauth.{credential.id}", self._ids.new("refresh")
        deadline = self._clock.monotonic() + _WAIT
        while (lease := await self._leases.acquire(name, holder, ttl=_LEASE)) is None:
            if self._clock.monotonic() >= deadline:
                return Refreshed("connect_error")
            await self._clock.sleep(_POLL)
        try:
            secret, version = await read_secret(self._means, principal, credential)
            if secret["access_token"] != spent:
                return Refreshed("succeeded", token=secret["access_token"])
            return await self._refresh(principal, credential, secret, version)
        finally:
            with contextlib.suppress(StorageUnavailable):  # it ends by itself
                await self._leases.release(lease)

    async def _refresh(
        self, principal: Principal, credential: ToolCredential, secret: Mapping[str, str], version: int
    ) -> Refreshed:
        headers, body = refresh_request(credential.auth["refresh"], secret)
        try:
            answer = await self._means.outward.post(credential.auth["refresh"]["token_endpoint"], headers, body)
        except (UpstreamUnavailable, PermissionDenied):
            return Refreshed("connect_error")
        grant = read_grant(answer)
        if grant is None:
            return Refreshed("failed", answer)
        changed = {**secret, "access_token": grant.access_token}
        if grant.refresh_token is not None:
            changed["refresh_token"] = grant.refresh_token
        try:
            await write_secret(self._means, principal, credential, changed, version)
        except Conflict:
            # Another replica or the owner was quicker: what is stored now is what everybody uses.
            stored, _ = await read_secret(self._means, principal, credential)
            return Refreshed("succeeded", token=stored["access_token"])
        ends = None if grant.expires_in is None else self._clock.now() + timedelta(seconds=grant.expires_in)
        await self._note_end(principal, credential, ends)
        return Refreshed("succeeded", token=grant.access_token)

    async def _note_end(self, principal: Principal, credential: ToolCredential, ends: datetime | None) -> None:
        table = tool_credentials

        async def write(tx: AsyncConnection) -> None:
            where = (owned(principal, table), table.c.id == credential.id)
            row = (await tx.execute(sa.select(table.c.auth).where(owned(principal, table), *where))).first()
            if row is not None:
                auth = {**row.auth, "expires_at": wire_time(ends)}
                await tx.execute(table.update().where(owned(principal, table), *where).values(auth=auth))

        await self._means.db.run(write, idempotent=True)

    async def _probe(self, credential: ToolCredential, token: str) -> tuple[str, Posted | None]:
        headers = {
            "authorization": f"Bearer {token}",
            "content-type": "application/json",
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": _PROTOCOL,
        }
        try:
            posted = await self._means.outward.post(
                credential.auth["mcp_server_url"], headers, msgspec.json.encode(INITIALIZE)
            )
        except (UpstreamUnavailable, PermissionDenied):
            return "unknown", None
        return judge(posted.status), posted


@dataclass(slots=True)
class StoredMcpCredential:
    """The headers of one credential: what the broker's MCP client takes as `McpCredential`."""

    tokens: McpTokens
    principal: Principal
    credential: ToolCredential
    _last: str | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """The same for the same account: its token may change."""
        return self.credential.id

    async def headers(self, *, refused: bool) -> Mapping[str, str]:
        """`refused`: the last token was answered with 401. Empty when there is no other."""
        try:
            token = await self.tokens.token(self.principal, self.credential, refused=self._last if refused else None)
        except CredentialMissing:
            if refused:
                return {}
            raise
        self._last = token
        return {"authorization": f"Bearer {token}"}


@dataclass(frozen=True, slots=True)
class Grant:
    """A token endpoint's yes."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    expires_in: float | None = None


def refresh_request(settings: Mapping[str, Any], secret: Mapping[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and form of a refresh (RFC 6749, section 6). Pure."""
    headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
    form = {"grant_type": "refresh_token", "refresh_token": secret["refresh_token"]}
    method = settings["token_endpoint_auth"]["type"]
    if method == "client_secret_basic":
        # Both are form-encoded first (section 2.3.1).
        pair = f"{quote_plus(settings['client_id'])}:{quote_plus(secret['client_secret'])}"
        headers["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    else:
        form["client_id"] = settings["client_id"]
        if method == "client_secret_post":
            form["client_secret"] = secret["client_secret"]
    form |= {name: settings[name] for name in ("scope", "resource") if settings[name]}
    return headers, urlencode(form).encode()


def read_grant(answer: Posted) -> Grant | None:
    """What a token endpoint granted; None for a no. Pure."""
    try:
        decoded = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    access = decoded.get("access_token") if isinstance(decoded, dict) else None
    if answer.status != 200 or not isinstance(access, str) or not access.isprintable() or not access:
        return None
    refresh, ends = decoded.get("refresh_token"), decoded.get("expires_in")
    good_end = isinstance(ends, int | float) and not isinstance(ends, bool) and 0 < ends < 10**9
    return Grant(access, refresh if isinstance(refresh, str) and refresh else None, float(ends) if good_end else None)


def judge(status: int) -> str:
    """What an MCP server's status says of the token. Pure."""
    if 200 <= status < 300:
        return "valid"
    return "invalid" if status in {401, 403} else "unknown"


def _shown(posted: Posted | None, hidden: Sequence[str]) -> dict[str, Any] | None:
    """An answer for the owner's eyes: cut, and without the secrets that it may repeat."""
    if posted is None:
        return None
    text = posted.body.decode("utf-8", "replace")
    for secret in sorted(set(hidden), key=len, reverse=True):
        text = text.replace(secret, "[redacted]")
    text = text.replace("\x00", "")
    return {
        "status_code": posted.status,
        "content_type": posted.content_type[:255],
        "body": text[:_SHOWN_BODY],
        "body_truncated": posted.truncated or len(text) > _SHOWN_BODY,
    }
