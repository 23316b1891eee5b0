"""What an organisation may grant itself: limits within the operator's defaults, and subjects that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claude_wrapper.api.admin.http import Asked
from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.limits import Limits, Scope


def parse_scope(value: str, *, field: str = "scope") -> Scope:
    """Raises InvalidRequest naming the field."""
    try:
        return Scope(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(Scope)}", field=field) from None


def limits_within(asked: Asked, scope: Scope, given: Mapping[str, Any]) -> dict[str, Any]:
    """Limits in the form that is stored. Raises InvalidRequest for what is no limit, PermissionDenied for more than the
    operator's default of that scope: only the operator may go beyond it."""
    limits = Limits.parse(given)
    looser = limits.looser_than(asked.deps.tenants.admission.settings.default(scope))
    if looser is not None and not asked.principal.is_operator:
        raise PermissionDenied(
            f"limits.{looser}: the operator of this server set a stricter limit for every {scope}; only the operator "
            "may go beyond it"
        )
    return limits.to_json()
