"""All routes of what sessions are made of."""

from __future__ import annotations

from typing import Final

from starlette.routing import Route

from claude_wrapper.api.managed import agents, environments, files, mcp, memory, skills, vaults, work

RESOURCE_ROUTES: Final[tuple[Route, ...]] = (
    *agents.ROUTES,
    *environments.ROUTES,
    *work.ROUTES,
    *files.ROUTES,
    *vaults.ROUTES,
    *mcp.ROUTES,
    *skills.ROUTES,
    *memory.ROUTES,
)
