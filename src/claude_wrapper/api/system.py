"""What the server says of itself: overview, liveness, health, pool, security."""

from __future__ import annotations

import html
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from claude_wrapper.api.state import Deps, deps_of

_DOCUMENTS = ("/docs", "/redoc", "/openapi.json")


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


async def livez(request: Request) -> Response:
    """The process runs and its event loop answers."""
    del request
    return _json({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether new work is welcome: not while draining, not while a check that matters fails."""
    deps = deps_of(request)
    if deps.lifecycle.draining:
        return _json({"status": "draining"}, 503)
    report = await deps.health()
    return _json({"status": report["status"]}, 200 if report["status"] != "unhealthy" else 503)


async def health(request: Request) -> Response:
    """Every check with its name, state and figures; 503 when one that matters fails."""
    report = await deps_of(request).health()
    return _json(report, 503 if report["status"] == "unhealthy" else 200)


async def security(request: Request) -> Response:
    """The sandbox and the caller's security level, mechanism by mechanism."""
    deps = deps_of(request)
    principal = await deps.authenticate(request)
    principal.require("read:organization")
    return _json(deps.security_report(await deps.security(principal.org)))


async def pool_stats(request: Request) -> Response:
    """The pool as this caller may see it: its own processes, an admin the organisation's, the operator all of them."""
    deps = deps_of(request)
    principal = await deps.authenticate(request)
    principal.require("read:pool")
    owner = principal.key_id or principal.user_id or principal.org
    stats = deps.pool.stats()
    everything = principal.is_operator
    whole_org = principal.may("write:organization") and principal.workspace is None
    now = deps.clock.now()
    slots = [
        slot
        for slot in stats.slots
        if slot.org is not None
        and (everything or (slot.org == principal.org and (whole_org or slot.principal == owner)))
    ]
    mine = [slot for slot in slots if slot.org == principal.org and slot.principal == owner]
    latest = max(mine, key=lambda slot: slot.last_used, default=None)
    users = [
        {
            "user_id": slot.principal,
            "session_id": slot.session,
            "idle_time": round(slot.idle_seconds, 3),
            "uptime": round(slot.uptime_seconds, 3),
            "created_at": slot.created_at,
            "last_used": slot.last_used,
            "pid": slot.pid,
            "alive": slot.alive,
            "frozen": slot.frozen,
            "turns": slot.turns,
        }
        for slot in slots
    ]
    content: dict[str, Any] = {
        "pool_size": stats.processes if everything else len(slots),
        "max_idle_time": stats.idle_seconds,
        "cleanup_interval": stats.sweep_seconds,
        "active_users": users,
        "process": {"pid": latest.pid, "session_id": latest.session} if latest else None,
        "time": now,
    }
    if everything:
        content |= {
            "states": stats.by_state,
            "spares": stats.spares,
            "waiting": stats.waiting,
            "claims": stats.claims,
            "evictions": stats.evictions,
        }
    content["limits"] = {
        "max_processes": stats.max_processes,
        "max_processes_per_org": deps.settings.max_processes_per_org,
        "queue_seconds": deps.settings.queue_seconds,
        "queue_length": deps.settings.queue_length,
    }
    return _json(content)


async def overview(request: Request) -> Response:
    """What can be asked of this server, generated from its routes: HTML for browsers, JSON for programs."""
    deps = deps_of(request)
    routes = _routes(request)
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(_page(routes, deps))
    return _json(
        {
            "name": "claude-wrapper",
            "version": deps.version,
            "docs": "/docs",
            "endpoints": [{"method": m, "path": p, "summary": s} for m, p, s in routes],
        }
    )


def _routes(request: Request) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for route in request.app.routes:
        if not isinstance(route, Route) or route.path.startswith(_DOCUMENTS):
            continue
        summary = (route.endpoint.__doc__ or "").strip().split("\n")[0]
        rows.extend((method, route.path, summary) for method in sorted((route.methods or set()) - {"HEAD"}))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def _page(routes: list[tuple[str, str, str]], deps: Deps) -> str:
    rows = "".join(
        f"<tr><td><code>{m}</code></td><td><code>{html.escape(p)}</code></td><td>{html.escape(s)}</td></tr>"
        for m, p, s in routes
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>claude-wrapper</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:3rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;width:100%}}td{{padding:.3rem .6rem;border-top:1px solid #ddd;vertical-align:top}}
code{{background:#f4f4f2;padding:.1rem .3rem;border-radius:.2rem}}</style>
<h1>claude-wrapper {html.escape(deps.version)}</h1>
<p>The unmodified Claude CLI as a service. <a href="/docs">Try the API</a> · <a href="/redoc">Reference</a> ·
<a href="/openapi.json">OpenAPI</a></p><table>{rows}</table></html>"""
