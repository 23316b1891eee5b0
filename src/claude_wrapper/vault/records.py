"""Credentials as values: what is asked for, what may be shown, and how rows become both."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from claude_wrapper.storage.tables.vault import vault_credentials
from claude_wrapper.vault.kinds import RULES, CredentialKind

TABLE: Final = "vault_credentials"
HINT_LENGTH: Final = 4
MIN_HINTED: Final = 16
"""Four characters of a shorter secret would tell too much of it."""


class Status(enum.StrEnum):
    """Whether a credential can be used."""

    ACTIVE = "active"
    DISABLED = "disabled"
    """By its owner."""
    INVALID = "invalid"
    """Upstream or the token endpoint refused it; new secrets make it active again."""


@dataclass(frozen=True, slots=True)
class CredentialSpec:
    """A credential to be kept. `workspace` and `user` narrow who it serves; both None: the whole organisation."""

    kind: CredentialKind
    name: str
    secret: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict)
    base_url: str | None = None
    workspace: str | None = None
    user: str | None = None
    rank: int = 0
    """Among credentials of the same reach the highest rank is taken; then the newest."""
    expires_at: datetime | None = None
    """When the access token ends (OAuth)."""
    named_only: bool = False
    """Never chosen by its reach: only requests that name it use it."""


@dataclass(frozen=True, slots=True)
class CredentialChange:
    """What to change; None leaves a field as it is."""

    name: str | None = None
    secret: Mapping[str, Any] | None = field(default=None, repr=False)
    config: Mapping[str, Any] | None = None
    base_url: str | None = None
    rank: int | None = None
    disabled: bool | None = None
    expires_at: datetime | None = None
    expected_version: int | None = None


@dataclass(frozen=True, slots=True)
class Credential:
    """What may be shown of a credential: never its secret."""

    id: str
    org_id: str
    workspace_id: str | None
    user_id: str | None
    kind: CredentialKind
    name: str
    base_url: str
    config: Mapping[str, str]
    hint: str
    """The last four characters of the key or access token."""
    fingerprint: str
    """Equal for equal secrets within the organisation."""
    rank: int
    named_only: bool
    status: Status
    problem: str | None
    """Why it is invalid, in the words of the protocol (`invalid_grant`)."""
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    version: int

    @property
    def provider(self) -> str:
        """`anthropic`, `bedrock`, …"""
        return RULES[self.kind].provider


@dataclass(frozen=True, slots=True)
class Sealed:
    """A credential as it is stored: what may be shown, and the ciphertext."""

    view: Credential
    sealed: bytes = field(repr=False)


COLUMNS: Final[tuple[sa.Column[Any], ...]] = tuple(column for column in vault_credentials.c if column.name != "sealed")
"""What a list reads: the ciphertext stays where it is."""


def read_credential(row: Any) -> Credential:
    """The record of a row."""
    return Credential(
        id=row.id,
        org_id=row.org_id,
        workspace_id=row.workspace_id,
        user_id=row.user_id,
        kind=CredentialKind(row.kind),
        name=row.name,
        base_url=row.base_url,
        config=row.config or {},
        hint=row.hint,
        fingerprint=row.fingerprint,
        rank=row.rank,
        named_only=row.named_only,
        status=Status(row.status),
        problem=row.problem,
        expires_at=row.expires_at,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


def read_sealed(row: Any) -> Sealed:
    """The record of a row, with its ciphertext."""
    return Sealed(read_credential(row), bytes(row.sealed))


def audited(credential: Credential) -> dict[str, Any]:
    """What the audit log keeps of a credential."""
    return {
        "kind": str(credential.kind),
        "name": credential.name,
        "workspace_id": credential.workspace_id,
        "user_id": credential.user_id,
        "base_url": credential.base_url,
        "fingerprint": credential.fingerprint,
        "rank": credential.rank,
        "status": str(credential.status),
    }


def main_secret(kind: CredentialKind, secret: Mapping[str, str]) -> str:
    """The one that is presented upstream."""
    return next(secret[name] for name in RULES[kind].main if name in secret)


def hint_of(secret: str) -> str:
    """The last four characters, or nothing when that would be too much."""
    return secret[-HINT_LENGTH:] if len(secret) >= MIN_HINTED else ""
