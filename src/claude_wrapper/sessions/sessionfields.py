"""What a session is made with: the fields of a create, read and checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions import records
from claude_wrapper.sessions.mounts import Mount
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.resources.values import Fields
from claude_wrapper.tenancy.principal import Principal

MAX_VAULTS: Final = 16
_MOST_CENTS: Final = 10**12


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session that is about to be."""

    agent: Mapping[str, Any]
    """The snapshot, as the wire shows it."""
    environment_id: str | None = None
    environment: Mapping[str, Any] | None = None
    title: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    vault_ids: Sequence[str] = ()
    budget: Mapping[str, Any] | None = None
    initial_events: Sequence[dict[str, Any]] = ()
    mounts: Sequence[Mount] = ()
    origin: str = records.BY_SESSIONS
    name: str | None = None

    def row(self, principal: Principal, session: str, thread: str, now: datetime) -> dict[str, Any]:
        """The row of a new session of this principal."""
        return {
            "id": session,
            "org_id": principal.org,
            "workspace_id": principal.workspace,
            "actor_id": principal.actor_id or principal.org,
            "key_id": principal.key_id,
            "user_id": principal.user_id,
            "origin": self.origin,
            "name": self.name,
            "status": records.IDLE,
            "stop_reason": None,
            "title": self.title,
            "agent_id": self.agent.get("id"),
            "agent_version": self.agent.get("version"),
            "agent": dict(self.agent),
            "environment_id": self.environment_id,
            "environment": None if self.environment is None else dict(self.environment),
            "vault_ids": list(self.vault_ids),
            "metadata": dict(self.metadata),
            "budget": None if self.budget is None else dict(self.budget),
            "outcomes": [],
            "usage": {},
            "thread_id": thread,
            "created_at": now,
            "updated_at": now,
        }


def budget_of(fields: Fields) -> dict[str, Any] | None:
    """`budget`: `{type: limit, max_list_cost: {amount: integer cents as a string, currency: USD}}`."""
    budget = fields.maybe_object("budget")
    if budget is None:
        return None
    budget.only("type", "max_list_cost").one_of("type", "limit")
    cost = budget.object("max_list_cost").only("amount", "currency")
    cost.one_of("currency", "USD")
    amount = cost.text("amount", most=16)
    if not amount.isascii() or not amount.isdigit() or not 0 < int(amount) <= _MOST_CENTS:
        raise InvalidRequest("must be a whole number of cents above 0, as a string", field=cost.at("amount"))
    return {"type": "limit", "max_list_cost": {"amount": amount, "currency": "USD"}}


def status_events(session: Session, reason: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The session works again (no reason), or goes on waiting."""
    thread = {"session_thread_id": session.thread_id, "agent_name": session.agent_name}
    if reason is None:
        return [{"type": "session.status_running"}, {"type": "session.thread_status_running", **thread}]
    return [
        {"type": "session.thread_status_idle", **thread, "stop_reason": dict(reason)},
        {"type": "session.status_idle", "stop_reason": dict(reason)},
    ]
