"""`/v1/organizations/policies`: fall-backs, the cache of answers and the version of the CLI. Ours."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from claude_wrapper.api.admin.http import AdminRoute, Asked, json
from claude_wrapper.tenancy.policies import Policies
from claude_wrapper.tenancy.policybook import get_policies, set_policies


class ChangedPolicies(msgspec.Struct, forbid_unknown_fields=True):
    """What to change; null puts a policy back to its default, what is not named stays."""

    fallback_models: dict[str, list[str]] | UnsetType | None = UNSET
    fallback_credentials: bool | UnsetType | None = UNSET
    cache_answers: str | UnsetType | None = UNSET
    cache_seconds: int | UnsetType | None = UNSET
    cache_share_with: list[str] | UnsetType | None = UNSET
    cli_version: str | UnsetType | None = UNSET


async def show_policies(asked: Asked) -> Response:
    """What is asked instead when the upstream fails, what may come from the cache, which CLI runs."""
    return json(_view(await asked.see(get_policies)))


async def change_policies(asked: Asked) -> Response:
    """Change some of the organisation's policies."""
    body = await asked.body(ChangedPolicies)
    given: dict[str, Any] = {
        name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not UNSET
    }
    return json(_view(await asked.do(set_policies, given)))


def _view(policies: Policies) -> dict[str, Any]:
    return {"type": "policies", **policies.to_json()}


_PATH = "/v1/organizations/policies"

ROUTES = (
    AdminRoute("GET", _PATH, "read:organization", show_policies),
    AdminRoute("POST", _PATH, "write:organization", change_policies, ChangedPolicies),
)
