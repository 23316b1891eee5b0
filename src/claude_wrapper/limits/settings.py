"""What an operator may decide about limits."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields

from claude_wrapper.limits.values import NO_LIMITS, Limits, Scope


class WithoutStore(enum.StrEnum):
    """What to do while the shared counters cannot be reached. Either way it is counted."""

    OPEN = "open"
    """Let through unchecked."""
    CLOSED = "closed"
    """Refuse with `storage_unavailable`, which clients retry."""


@dataclass(slots=True)
class LimitSettings:
    """Defaults for everyone, and what happens when the shared counters are away. One object for all that asks limits."""

    default_key: Limits = NO_LIMITS
    """Limits of every API key that has none of its own, as in `Limits.parse("requests=100/hour")`."""
    default_user: Limits = NO_LIMITS
    default_workspace: Limits = NO_LIMITS
    default_organization: Limits = NO_LIMITS
    rates_without_store: WithoutStore = WithoutStore.OPEN
    """Rates protect against floods: better unprotected for a minute than down."""
    concurrency_without_store: WithoutStore = WithoutStore.OPEN
    budgets_without_store: WithoutStore = WithoutStore.CLOSED
    """Budgets protect money: better down for a minute than unbounded."""
    store_retry_seconds: float = 1.0
    """After the shared counters failed, how long they are not asked, so that requests do not each wait for a time-out."""
    lease_seconds: float = 60.0
    """A dead replica's places (turns, processes, sessions) come free after this; living ones renew three times as often."""
    reservation_seconds: float = 900.0
    """A reservation whose replica died is given back after this; longer than any upstream call."""
    rules_seconds: float = 10.0
    """How long an organisation's limits and budgets are taken from memory; changes by this server show at once."""
    reconcile_seconds: float = 300.0
    """How often budget counters are raised to what the ledger says."""
    key_prefix: str = "cw"
    """First part of all keys in the shared store."""

    def take(self, other: LimitSettings) -> None:
        """From the next request on, what `other` says holds."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

    @property
    def any_default(self) -> bool:
        """Whether anybody without limits of their own has any."""
        defaults = (self.default_key, self.default_user, self.default_workspace, self.default_organization)
        return any(limits.entries for limits in defaults)

    def default(self, scope: Scope) -> Limits:
        match scope:
            case Scope.KEY:
                return self.default_key
            case Scope.USER:
                return self.default_user
            case Scope.WORKSPACE:
                return self.default_workspace
            case Scope.ORGANIZATION:
                return self.default_organization
            case Scope.SESSION:
                return NO_LIMITS


@dataclass(slots=True)
class LimitCounts:
    """What happened, for whoever exports metrics. Plain numbers that only grow; read them with a pull."""

    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """By limit: `requests`, `input_tokens`, …, `budget`."""
    let_through: dict[str, int] = field(default_factory=dict)
    """By kind (`rates`, `concurrency`, `budgets`): passed unchecked because the store was away."""
    turned_away: dict[str, int] = field(default_factory=dict)
    """By kind: refused because the store was away."""
    alerts: dict[int, int] = field(default_factory=dict)
    """Alerts of budgets that this replica told, by the percentage of the cap."""
    alerts_failed: int = 0
    bad_rules: int = 0
    """Times that a limit in the database could not be read and was left out."""
    stale_rules: int = 0
    """Times that old limits were used because the database was away."""

    def count(self, which: dict[str, int], name: str) -> None:
        which[name] = which.get(name, 0) + 1
