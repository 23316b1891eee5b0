"""Doubles at the ports of limits: rules in a dict, a ledger in a number, a sink that remembers, a price of one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.limits import (
    Action,
    Admission,
    Alert,
    AlertDesk,
    Budget,
    LimitCounts,
    Limits,
    LimitSettings,
    Period,
    Scope,
    Stores,
    Window,
)
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.limits.stores import StoreGone
from claude_wrapper.testing.clock import ManualClock, SequentialIds
from claude_wrapper.wire.usage import Usage


@dataclass
class Who:
    """As much of a principal as limits look at."""

    org: str = "org_1"
    workspace: str | None = "wrkspc_1"
    key_id: str | None = "apikey_1"
    user_id: str | None = "user_1"


@dataclass
class Bound:
    org: str = "org_1"
    workspace: str | None = "wrkspc_1"
    key_id: str | None = "apikey_1"
    user: str | None = "user_1"
    session: str = "sesn_1"


@dataclass
class Answered:
    usage: Usage
    model: str = "claude"
    started_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Rulebook:
    current: OrgRules = field(default_factory=OrgRules)

    async def rules(self, org: str | None, session: str | None = None) -> OrgRules:
        return self.current

    def limit(self, scope: Scope, ident: str, text: str) -> None:
        self.current = OrgRules({**self.current.limits, (scope, ident): Limits.parse(text)}, self.current.budgets)

    def budget(self, *budgets: Budget) -> None:
        found: dict[tuple[Scope, str], tuple[Budget, ...]] = {}
        for one in budgets:
            found[one.scope, one.subject] = (*found.get((one.scope, one.subject), ()), one)
        self.current = OrgRules(self.current.limits, found)


@dataclass
class FakeLedger:
    """What was spent before; `away` makes it unreachable."""

    amounts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    away: bool = False
    asked: list[tuple[str, datetime, datetime | None]] = field(default_factory=list)

    async def spent(self, org: str, scope: str, subject: str, start: datetime, end: datetime | None) -> int:
        if self.away:
            raise StorageUnavailable("the ledger is away")
        self.asked.append((subject, start, end))
        return self.amounts[subject]


class OneMicroPerToken:
    async def micros(self, org: str, model: str, usage: Usage, at: datetime) -> int:
        return usage.input_tokens + usage.output_tokens


@dataclass
class CollectedAlerts:
    """An `AlertDesk` that needs no database: remembers what moved across which share."""

    moves: list[tuple[str, int, int]] = field(default_factory=list)

    async def moved(self, budget: Budget, window: Window, before: int, after: int) -> None:
        self.moves.append((budget.id, before, after))

    async def redeliver(self) -> None: ...


@dataclass
class Inbox:
    """An alert sink that can fail."""

    alerts: list[Alert] = field(default_factory=list)
    failing: bool = False

    async def raised(self, alert: Alert) -> None:
        if self.failing:
            raise ConnectionError("nobody answers")
        self.alerts.append(alert)


class Gone:
    """Hot counters that cannot be reached while `away`."""

    def __init__(self, inner: object) -> None:
        self.inner = inner
        self.away = True
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        async def ask(*args: object, **kw: object) -> object:
            self.asked += 1
            if self.away:
                raise StoreGone("gone")
            return await getattr(self.inner, name)(*args, **kw)

        return ask


def gone(stores: Stores) -> tuple[Stores, list[Gone]]:
    """The same stores, and switches for each."""
    switches = [Gone(stores.rates), Gone(stores.leases), Gone(stores.spend)]
    return Stores(*switches), switches  # type: ignore[arg-type]


@dataclass
class World:
    """Everything that limits need, wired."""

    clock: ManualClock
    stores: Stores
    settings: LimitSettings = field(default_factory=LimitSettings)
    rulebook: Rulebook = field(default_factory=Rulebook)
    ledger: FakeLedger = field(default_factory=FakeLedger)
    alerts: CollectedAlerts = field(default_factory=CollectedAlerts)
    counts: LimitCounts = field(default_factory=LimitCounts)
    ids: SequentialIds = field(default_factory=SequentialIds)

    def __post_init__(self) -> None:
        desk: AlertDesk = self.alerts  # type: ignore[assignment]
        self.admission = Admission(
            self.rulebook,
            self.stores,
            self.ledger,
            OneMicroPerToken(),
            desk,
            clock=self.clock,
            ids=self.ids,
            settings=self.settings,
            counts=self.counts,
        )


def budget(cap: int, **kw: object) -> Budget:
    """A monthly budget of the organisation that blocks."""
    values: dict[str, object] = {
        "id": "spl_1",
        "org": "org_1",
        "scope": Scope.ORGANIZATION,
        "subject": "org_1",
        "period": Period.MONTH,
        "cap_micros": cap,
        "action": Action.BLOCK,
    }
    return Budget(**{**values, **kw})  # type: ignore[arg-type]
