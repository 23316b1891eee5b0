"""Rate limits, concurrency and budgets; `admission` asks them in order."""

from __future__ import annotations

from claude_wrapper.limits.admission import Admission, Admitted, Facts
from claude_wrapper.limits.alerts import AlertDesk, AlertSink
from claude_wrapper.limits.book import CHANNEL, RuleBook
from claude_wrapper.limits.budgets import Action, Alert, Budget, Period, Window
from claude_wrapper.limits.gate import Gate, Reservation
from claude_wrapper.limits.gcra import Rate
from claude_wrapper.limits.memory import memory_stores
from claude_wrapper.limits.redis import open_client, redis_stores
from claude_wrapper.limits.refusals import BudgetReached, LimitReached
from claude_wrapper.limits.settings import LimitCounts, LimitSettings, WithoutStore
from claude_wrapper.limits.stores import Stores
from claude_wrapper.limits.values import Limits, Resource, Scope, Subjects

__all__ = [
    "CHANNEL",
    "Action",
    "Admission",
    "Admitted",
    "Alert",
    "AlertDesk",
    "AlertSink",
    "Budget",
    "BudgetReached",
    "Facts",
    "Gate",
    "LimitCounts",
    "LimitReached",
    "LimitSettings",
    "Limits",
    "Period",
    "Rate",
    "Reservation",
    "Resource",
    "RuleBook",
    "Scope",
    "Stores",
    "Subjects",
    "Window",
    "WithoutStore",
    "memory_stores",
    "open_client",
    "redis_stores",
]
