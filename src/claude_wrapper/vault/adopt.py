"""OAuth tokens that come with a request: kept once, found again by any token that they ever had.

A caller who sends its token pair with every request keeps one identity (the credential's id) while the server refreshes
the pair behind it: the sent tokens may be long spent, they still lead to the credential. Such a credential serves only
those who send its tokens (or name it); it never becomes the organisation's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.storage.engine import Database
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.credentials import OWN, Rules, find_for_token, insert_credential
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.records import Credential, CredentialSpec


@dataclass(frozen=True, slots=True)
class TokenPair:
    """What a caller sends."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None
    client_id: str | None = None


async def adopt_tokens(
    db: Database, keys: OrgKeys, principal: Principal, scribe: Scribe, *, rules: Rules, pair: TokenPair
) -> Credential:
    """The credential of this token pair; kept now if it was never seen. Needs `write:messages`.

    Raises InvalidRequest when the operator does not allow OAuth tokens.
    """
    principal.require(OWN)
    if not rules.allow_oauth:
        raise InvalidRequest(
            "OAuth tokens are not accepted here; the operator can allow them", field="oauth_credentials"
        )
    own = await keys.of(principal.org)
    tokens = [token for token in (pair.refresh_token, pair.access_token) if token]
    found = await db.query(lambda tx: find_for_token(tx, principal, own, tokens))
    if found is not None:
        return found
    spec = CredentialSpec(
        kind=CredentialKind.OAUTH,
        name="Sent with a request",
        secret={
            "access_token": pair.access_token,
            **({"refresh_token": pair.refresh_token} if pair.refresh_token else {}),
        },
        config={"client_id": pair.client_id} if pair.client_id else {},
        user=principal.user_id,
        workspace=principal.workspace,
        expires_at=pair.expires_at,
        named_only=True,
    )
    try:
        async with db.transaction() as tx:
            if (found := await find_for_token(tx, principal, own, tokens)) is not None:
                return found
            return await insert_credential(tx, principal, scribe, spec, keys=own, rules=rules)
    except Conflict:
        found = await db.query(lambda tx: find_for_token(tx, principal, own, tokens))
        if found is None:
            raise
        return found
