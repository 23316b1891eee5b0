"""What is known of an API key: the records that `apikeys` and `keyring` share."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from claude_wrapper.tenancy.scopes import Role, scopes_of


class KeyStatus(enum.StrEnum):
    """`expired` is never stored: it follows from the time."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    ARCHIVED = "archived"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    id: str
    org_id: str
    workspace_id: str | None
    user_id: str | None
    name: str
    hint: str
    role: Role
    scopes: tuple[str, ...] | None
    allowed_models: tuple[str, ...] | None
    limits: Mapping[str, Any]
    status: KeyStatus
    is_operator: bool
    created_by_kind: str | None
    created_by_id: str | None
    replaces: str | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    version: int


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key with its secret, which is shown this once."""

    key: ApiKey
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a key should be."""

    name: str
    role: Role = Role.DEVELOPER
    workspace_id: str | None = None
    user_id: str | None = None
    scopes: Sequence[str] | None = None
    """None: all scopes of the role."""
    allowed_models: Sequence[str] | None = None
    """None: all models; names may end in `*`."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What to change; None leaves a field as it is."""

    name: str | None = None
    status: KeyStatus | None = None
    scopes: Sequence[str] | None = None
    allowed_models: Sequence[str] | None = None
    limits: Mapping[str, Any] | None = None
    expires_at: datetime | None = None
    expected_version: int | None = None
    """The version that the editor saw; another one meanwhile is a Conflict."""


def effective_scopes(role: Role, scopes: Sequence[str] | None) -> frozenset[str]:
    """What a key may do: its role's scopes, narrowed by its own."""
    mine = scopes_of(role)
    return mine if scopes is None else mine & frozenset(scopes)


def audited_key(key: ApiKey) -> dict[str, Any]:
    return {
        "name": key.name,
        "role": str(key.role),
        "workspace_id": key.workspace_id,
        "user_id": key.user_id,
        "scopes": key.scopes,
        "allowed_models": key.allowed_models,
        "limits": dict(key.limits),
        "expires_at": key.expires_at,
    }


def read_key(row: Any, now: datetime) -> ApiKey:
    status = KeyStatus(row.status)
    if status is KeyStatus.ACTIVE and row.expires_at is not None and row.expires_at <= now:
        status = KeyStatus.EXPIRED
    return ApiKey(
        id=row.id,
        org_id=row.org_id,
        workspace_id=row.workspace_id,
        user_id=row.user_id,
        name=row.name,
        hint=row.hint,
        role=Role(row.role),
        scopes=None if row.scopes is None else tuple(row.scopes),
        allowed_models=None if row.allowed_models is None else tuple(row.allowed_models),
        limits=row.limits or {},
        status=status,
        is_operator=row.is_operator,
        created_by_kind=row.created_by_kind,
        created_by_id=row.created_by_id,
        replaces=row.replaces,
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        version=row.version,
    )
