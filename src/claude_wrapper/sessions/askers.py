"""Who asked for a session's turns, kept with the session: another replica may have to run them. Pure.

No right is kept: what the asker was allowed was checked when they asked. Only what decides which credential pays, which
models may stand in, and what they may see of their own session, goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claude_wrapper.sessions.spec import Owner
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role


def noted(principal: Principal) -> dict[str, Any]:
    """As it is stored."""
    return {
        "kind": principal.actor_kind.value,
        "key": principal.key_id,
        "user": principal.user_id,
        "workspace": principal.workspace,
        "staff": principal.is_staff,
        "operator": principal.is_operator,
        "models": None if principal.allowed_models is None else sorted(principal.allowed_models),
    }


def asking(org: str, asker: Mapping[str, Any]) -> Principal:
    """Whom `noted` described, with no right of their own."""
    return Principal(
        org,
        asker["workspace"],
        ActorKind(asker["kind"]),
        asker["key"],
        asker["user"],
        Role.VIEWER,
        frozenset(),
        allowed_models=None if asker.get("models") is None else frozenset(asker["models"]),
        is_operator=bool(asker["operator"]),
        is_staff=bool(asker["staff"]),
    )


def acting(owner: Owner) -> Principal:
    """The server, writing down what a session does: in its organisation and workspace, with no right of its own."""
    kind = ActorKind.API_KEY if owner.key_id else ActorKind.USER
    return Principal(owner.org, owner.workspace, kind, owner.key_id, owner.user, Role.VIEWER, frozenset())
