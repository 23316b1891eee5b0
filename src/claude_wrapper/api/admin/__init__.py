"""The Admin API under `/v1/organizations`: shaped like Anthropic's where one exists, so that its SDK's calls work."""

from __future__ import annotations

from starlette.routing import Route

from claude_wrapper.api.admin import (
    apikeys,
    budgets,
    canary,
    credentials,
    environmentkeys,
    limits,
    organizations,
    people,
    policies,
    prices,
    reports,
    workspaces,
)
from claude_wrapper.api.admin.http import AdminRoute

TABLE: tuple[AdminRoute, ...] = (
    *organizations.ROUTES,
    *apikeys.ROUTES,
    *environmentkeys.ROUTES,
    *people.ROUTES,
    *workspaces.ROUTES,
    *credentials.ROUTES,
    *limits.ROUTES,
    *budgets.ROUTES,
    *policies.ROUTES,
    *prices.ROUTES,
    *canary.ROUTES,
    *reports.ROUTES,
    *organizations.BY_ID,
)

ADMIN_ROUTES: tuple[Route, ...] = tuple(row.route() for row in TABLE)
