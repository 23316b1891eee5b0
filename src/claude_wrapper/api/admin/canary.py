"""`/v1/cli`: the versions of the CLI that run here, and the operator's word on the new one."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.responses import Response

from claude_wrapper.api.admin.http import OPERATOR, AdminRoute, Asked, json
from claude_wrapper.sessions.canary import State


class CanaryDecision(msgspec.Struct, forbid_unknown_fields=True):
    """What becomes of the new version: all new conversations get it, none, or its share again."""

    state: Literal["promoted", "rolled_back", "running"]


async def show_versions(asked: Asked) -> Response:
    """The versions of the CLI, how their turns went, and whether the new one was taken back (operator)."""
    return json(await asked.deps.versions.report())


async def decide_on_canary(asked: Asked) -> Response:
    """Promote the new version, take it back, or try it again (operator)."""
    body = await asked.body(CanaryDecision)
    await asked.deps.versions.decide(State(body.state))
    return json(await asked.deps.versions.report())


ROUTES = (
    AdminRoute("GET", "/v1/cli", OPERATOR, show_versions),
    AdminRoute("POST", "/v1/cli", OPERATOR, decide_on_canary, CanaryDecision),
)
