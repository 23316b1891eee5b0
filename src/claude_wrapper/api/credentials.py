"""Which upstream credential serves a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from claude_wrapper.broker.calls import CacheTerms, Credential, CredentialKind
from claude_wrapper.broker.fallback import standby_of
from claude_wrapper.errors import CredentialMissing, InvalidRequest, PermissionDenied
from claude_wrapper.tenancy.policies import Policies
from claude_wrapper.tenancy.policybook import PolicyBook
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.vault.kinds import CredentialKind as VaultKind
from claude_wrapper.vault.resolve import Leased, Resolver
from claude_wrapper.wire.extensions import OAuthCredentials

HEADER: Final = "cw-credential"
"""Names the stored credential that is to serve a request."""

_OAUTH_REFUSED = (
    "oauth_credentials: this server does not take subscription OAuth tokens. They are for their own owner's use under "
    "the provider's terms; the operator can allow that with CLAUDE_WRAPPER_ALLOW_OAUTH=true. API keys are the normal way."
)


@dataclass(frozen=True, slots=True)
class UpstreamCredentials:
    """Request's own, or the one that it names → the caller's stored one → the operator's, for the operator's own people."""

    resolver: Resolver
    upstream_url: str
    allow_oauth: bool
    policies: PolicyBook

    async def choose(
        self, principal: Principal, oauth: OAuthCredentials | None, *, named: str | None = None
    ) -> Credential:
        """Raises PermissionDenied for OAuth tokens that are not allowed, CredentialMissing when there is none, NotFound
        for a `named` one that does not serve the caller."""
        if oauth is not None:
            if named is not None:
                raise InvalidRequest("cannot be given together with oauth_credentials", field=HEADER)
            if not self.allow_oauth:
                raise PermissionDenied(_OAUTH_REFUSED)
            return Credential(
                id=f"cred_oauth_{_fingerprint(oauth)}",
                kind=CredentialKind.OAUTH,
                secret=oauth.access_token,
                base_url=self.upstream_url,
            )
        policies = await self.policies.of(principal)
        if named is not None or not policies.fallback_credentials:
            return _with(policies, presented(await self.resolver.lease(principal, named=named)))
        first, *others = await self.resolver.lease_all(principal)
        return _with(policies, presented(first), [presented(one) for one in others if _signed(one)])

    def owner_of(self, oauth: OAuthCredentials) -> Principal:
        """The caller whom these tokens identify: a hash of the token, as in the original system."""
        if not self.allow_oauth:
            raise PermissionDenied(_OAUTH_REFUSED)
        name = _fingerprint(oauth)
        return Principal(
            org=f"org_oauth_{name}",
            workspace=None,
            actor_kind=ActorKind.USER,
            key_id=None,
            user_id=name,
            role=Role.DEVELOPER,
            scopes=scopes_of(Role.DEVELOPER),
        )


def _with(policies: Policies, credential: Credential, others: Sequence[Credential] = ()) -> Credential:
    """A credential with what may stand in for it, and what of it may be kept."""
    standby = standby_of(policies.fallback_models, others)
    terms = CacheTerms(policies.cache_answers, policies.cache_seconds, share=bool(policies.cache_share_with))
    return replace(credential, standby=standby, cache=terms)


def _signed(leased: Leased) -> bool:
    return leased.kind not in (VaultKind.BEDROCK, VaultKind.VERTEX)


def presented(leased: Leased) -> Credential:
    """How a leased credential is shown upstream. Raises CredentialMissing for a provider that cannot be signed for."""
    if not _signed(leased):
        raise CredentialMissing(
            f"the stored credential {leased.id} is for {leased.kind}, whose requests this server cannot sign yet; "
            "store an API key or a Messages-compatible base URL"
        )
    if leased.kind is VaultKind.OAUTH:
        return Credential(leased.id, CredentialKind.OAUTH, leased.secret, leased.base_url, provider=leased.provider)
    headers = {"authorization": f"Bearer {leased.secret}"} if leased.bearer else {}
    return Credential(leased.id, CredentialKind.API_KEY, leased.secret, leased.base_url, headers, leased.provider)


def _fingerprint(oauth: OAuthCredentials) -> str:
    """16 hexadecimal digits of SHA-256, the original system's `user_id`."""
    return hashlib.sha256(oauth.access_token.encode()).hexdigest()[:16]
