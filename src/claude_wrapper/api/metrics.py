"""`GET /metrics`: everything that is counted, for Prometheus and whatever reads its text."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from claude_wrapper.api.state import deps_of

OPERATE: Final = "operate:server"

_DIALECTS: Final = (
    ("/v1/messages", "anthropic"),
    ("/v1/models", "anthropic"),
    ("/v1/organizations", "admin"),
    ("/v1/security", "operations"),
    ("/v1/pool", "operations"),
    ("/v1/", "sessions"),
)
"""The first beginning that fits a path decides."""


def dialect_of(path: str) -> str:
    """Which of the server's languages a path belongs to: a label's value, so one of a few."""
    return next((dialect for start, dialect in _DIALECTS if path.startswith(start)), "operations")


async def metrics(request: Request) -> Response:
    """Metrics as Prometheus text, or OpenMetrics when the scraper asks for it."""
    deps = deps_of(request)
    if not deps.settings.metrics_public:
        # They tell of all organisations together: the operator's, like the pool's own figures.
        (await deps.authenticate(request)).require(OPERATE)
    deps.metrics.refresh()
    body, content_type = await asyncio.to_thread(deps.metrics.encode, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})
