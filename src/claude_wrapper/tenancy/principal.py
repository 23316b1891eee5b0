"""Who asks: the one value that every store function takes and puts into its WHERE clause."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from claude_wrapper.errors import PermissionDenied
from claude_wrapper.tenancy.scopes import ALL_SCOPES, Role, scopes_of


class ActorKind(enum.StrEnum):
    """What kind of thing acts."""

    API_KEY = "api_key"
    USER = "user"
    OPERATOR = "operator"
    WORKER = "worker"
    """A worker of a self-hosted environment, by its key or a sessions token."""


@dataclass(frozen=True, slots=True)
class WorkerGrant:
    """What a worker's credential is for. It opens nothing by itself: its principal holds no scope until a route that
    is made for workers has found that the request stays within the grant."""

    environment: str
    work: str | None = None
    """The one work item of a sessions token; None: an environment key."""
    session: str | None = None
    generation: int | None = None
    live: bool = True
    """False: the item was stopped, or its lease ended; its token may only learn that."""


_NO_LIMITS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, for which organisation, and what they may do. Made by authentication, never changed."""

    org: str
    """The organisation that is acted in. Empty for an operator that acts in none (see `acting_in`)."""
    workspace: str | None
    """The only workspace that is visible; None: all of the organisation's."""
    actor_kind: ActorKind
    key_id: str | None
    user_id: str | None
    role: Role
    scopes: frozenset[str]
    allowed_models: frozenset[str] | None = None
    """None: all. Otherwise exact names, and prefixes that end in `*`."""
    is_operator: bool = False
    is_staff: bool = False
    """Whether the organisation is the operator's own: only then may the operator's upstream credential be used."""
    limits: Mapping[str, Any] = field(default_factory=lambda: _NO_LIMITS, hash=False)
    """The key's own limits, on top of those of user, workspace and organisation."""
    worker: WorkerGrant | None = None
    """Set for workers of self-hosted environments alone."""

    @property
    def actor_id(self) -> str | None:
        """The key or user that acts."""
        return self.key_id or self.user_id

    def may(self, scope: str) -> bool:
        """Whether the scope is held."""
        return scope in self.scopes

    def require(self, scope: str) -> None:
        """Raise PermissionDenied, naming the scope, unless it is held."""
        if scope not in self.scopes:
            raise PermissionDenied(
                f"this needs the scope {scope!r}, which the {self.role} role or this key does not have",
                details={"error_code": "api_key_scope_missing", "scope": scope},
            )

    def may_use(self, model: str) -> bool:
        """Whether the model is allowed for this principal."""
        return may_use(self.allowed_models, model)

    def acting_in(self, org: str, *, workspace: str | None = None) -> Principal:
        """The operator, acting in this organisation; raises PermissionDenied for anyone else."""
        require_operator(self)
        return replace(self, org=org, workspace=workspace)


def may_use(allowed: frozenset[str] | None, model: str) -> bool:
    """Whether a model is among those that are allowed, written as in `Principal.allowed_models`."""
    if allowed is None or model in allowed:
        return True
    return any(name.endswith("*") and model.startswith(name[:-1]) for name in allowed)


def operator(*, key_id: str | None = None, user_id: str | None = None) -> Principal:
    """The operator of the server, acting in no organisation yet: for the command line and start-up."""
    return Principal(
        org="",
        workspace=None,
        actor_kind=ActorKind.OPERATOR,
        key_id=key_id,
        user_id=user_id,
        role=Role.OWNER,
        scopes=ALL_SCOPES,
        is_operator=True,
    )


def user_principal(org: str, user_id: str, role: Role, *, workspace: str | None = None) -> Principal:
    """A signed-in person in one organisation."""
    return Principal(org, workspace, ActorKind.USER, None, user_id, role, scopes_of(role))


def require_operator(principal: Principal) -> None:
    """Raise PermissionDenied unless the operator asks."""
    if not principal.is_operator:
        raise PermissionDenied("only the operator of this server may do this")


def require_grantable(principal: Principal, scopes: frozenset[str], *, what: str) -> None:
    """Raise PermissionDenied if `scopes` holds something that the principal does not: nobody can hand on more."""
    missing = sorted(scopes - principal.scopes)
    if missing:
        raise PermissionDenied(
            f"you cannot give {what}: it holds {missing[0]!r}, which you do not", details={"scope": missing[0]}
        )


def owned(principal: Principal, table: sa.Table) -> sa.ColumnElement[bool]:
    """The WHERE clause of everything: rows of the principal's organisation and, if it is confined to one, workspace."""
    if table.name == "organizations":
        return table.c.id == principal.org
    clause = table.c.org_id == principal.org
    if principal.workspace is None:
        return clause
    if table.name == "workspaces":
        return sa.and_(clause, table.c.id == principal.workspace)
    if "workspace_id" in table.c:
        return sa.and_(clause, table.c.workspace_id == principal.workspace)
    return clause
