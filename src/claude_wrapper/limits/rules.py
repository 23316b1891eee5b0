"""The limits and budgets of one organisation, as one immutable value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from claude_wrapper.limits.budgets import Budget
from claude_wrapper.limits.settings import LimitSettings
from claude_wrapper.limits.values import NO_LIMITS, Limits, Scope, Subjects

Subject = tuple[Scope, str]


@dataclass(frozen=True, slots=True, eq=False)
class OrgRules:
    """Everything that limits one organisation and those in it. Compared by identity: a change makes a new one."""

    limits: Mapping[Subject, Limits] = field(default_factory=dict)
    budgets: Mapping[Subject, tuple[Budget, ...]] = field(default_factory=dict)

    def limits_of(self, subjects: Subjects, settings: LimitSettings) -> Iterator[tuple[Scope, str, Limits]]:
        """Each subject's effective limits, narrowest first; all of them must let a request pass."""
        for scope, ident in subjects:
            own = self.limits.get((scope, ident), NO_LIMITS).over(settings.default(scope))
            if own.entries:
                yield scope, ident, own

    def budgets_of(self, subjects: Subjects) -> tuple[Budget, ...]:
        """The budgets that a call of these subjects draws on, narrowest first."""
        if not self.budgets:
            return ()
        return tuple(budget for subject in subjects for budget in self.budgets.get(subject, ()))


class RuleSource(Protocol):
    """Where the rules come from: `book.RuleBook`."""

    async def rules(self, org: str | None, session: str | None = None) -> OrgRules:
        """The organisation's rules, with the budgets of `session`. Raises StorageUnavailable if they were never read."""
        ...
