"""Which upstream credential serves a request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from claude_wrapper.broker.calls import Credential, CredentialKind
from claude_wrapper.errors import CredentialMissing, PermissionDenied
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.wire.extensions import OAuthCredentials

_OAUTH_REFUSED = (
    "oauth_credentials: this server does not take subscription OAuth tokens. They are for their own owner's use under "
    "the provider's terms; the operator can allow that with CLAUDE_WRAPPER_ALLOW_OAUTH=true. API keys are the normal way."
)


@dataclass(frozen=True, slots=True)
class UpstreamCredentials:
    """Request's own → the caller's stored one → the operator's, for the operator's own people."""

    upstream_url: str
    operator_api_key: str | None
    allow_oauth: bool

    async def choose(self, principal: Principal, oauth: OAuthCredentials | None) -> Credential:
        """Raises PermissionDenied for OAuth tokens that are not allowed, CredentialMissing when there is none."""
        if oauth is not None:
            if not self.allow_oauth:
                raise PermissionDenied(_OAUTH_REFUSED)
            return Credential(
                id=f"cred_oauth_{_fingerprint(oauth)}",
                kind=CredentialKind.OAUTH,
                secret=oauth.access_token,
                base_url=self.upstream_url,
            )
        if self.operator_api_key is not None and (principal.is_operator or principal.is_staff):
            return Credential(
                id="cred_operator",
                kind=CredentialKind.API_KEY,
                secret=self.operator_api_key,
                base_url=self.upstream_url,
            )
        raise CredentialMissing(
            "no upstream credential: the organisation has none stored, and the operator's ANTHROPIC_API_KEY is "
            + ("not set" if self.operator_api_key is None else "only for the operator's own people")
        )

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


def _fingerprint(oauth: OAuthCredentials) -> str:
    """16 hexadecimal digits of SHA-256, the original system's `user_id`."""
    return hashlib.sha256(oauth.access_token.encode()).hexdigest()[:16]
