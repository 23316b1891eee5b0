"""What a worker of a self-hosted environment may ask for: these routes, within its grant, and nothing else.

Its credential makes a principal without any scope, so every other route refuses it. Here, and only here, a request that
stays within the grant is given the scopes that its route asks for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request

from claude_wrapper.api.state import Deps
from claude_wrapper.errors import AuthenticationFailed, NotFound, PermissionDenied
from claude_wrapper.ids import well_formed
from claude_wrapper.sessions import mounts, records
from claude_wrapper.sessions.records import Session
from claude_wrapper.tenancy.principal import Principal, WorkerGrant

_READ_SESSION: Final = frozenset({"read:sessions"})
_READ: Final = frozenset({"read:agents"})
_MEMORIES: Final = "/v1/memory_stores/{store_id}/memories"
WORK: Final = "/v1/environments/{environment_id}/work"

RESULTS: Final = frozenset({"user.tool_result", "user.custom_tool_result"})
"""All that a worker may send into a session: it can neither speak for the user nor confirm its own calls."""

KEY_ROUTES: Final = frozenset({("GET", WORK + "/poll"), ("POST", WORK + "/{work_id}/ack"), ("GET", WORK)})
"""An environment key's alone."""
SERVING_ROUTES: Final = frozenset({("POST", WORK + "/{work_id}/heartbeat"), ("POST", WORK + "/{work_id}/stop")})
"""Also open to a token whose lease is over: it is told so."""
SESSION_ROUTES: Final[Mapping[tuple[str, str], frozenset[str]]] = {
    ("GET", "/v1/sessions/{session_id}"): _READ_SESSION,
    ("GET", "/v1/sessions/{session_id}/events"): _READ_SESSION,
    ("GET", "/v1/sessions/{session_id}/events/stream"): _READ_SESSION,
    ("POST", "/v1/sessions/{session_id}/events"): _READ_SESSION | {"write:sessions"},
}
SKILL_ROUTES: Final = frozenset(
    {
        ("GET", "/v1/skills/{skill_id}/versions/{version}"),
        ("GET", "/v1/skills/{skill_id}/versions/{version}/content"),
    }
)
MEMORY_ROUTES: Final[Mapping[tuple[str, str], frozenset[str]]] = {
    ("GET", "/v1/memory_stores/{store_id}"): _READ,
    ("GET", _MEMORIES): _READ,
    ("GET", _MEMORIES + "/{memory_id}"): _READ,
    ("POST", _MEMORIES): _READ | {"write:agents"},
    ("POST", _MEMORIES + "/{memory_id}"): _READ | {"write:agents"},
    ("DELETE", _MEMORIES + "/{memory_id}"): _READ | {"write:agents"},
}
TOKEN_ROUTES: Final = SERVING_ROUTES | SESSION_ROUTES.keys() | SKILL_ROUTES | MEMORY_ROUTES.keys()
"""Everything that a sessions token opens."""


async def within_grant(request: Request, deps: Deps, principal: Principal, route: tuple[str, str]) -> Principal:
    """The principal with what this route (method and path template) needs, if the request stays within the grant.

    Raises PermissionDenied for a route that is not for this credential, NotFound for ids beyond the grant, and
    AuthenticationFailed for a token whose lease is over.
    """
    grant = principal.worker
    if grant is None:
        return principal
    asked = {name: str(value) for name, value in request.path_params.items()}
    if route in KEY_ROUTES or route in SERVING_ROUTES:
        if route in KEY_ROUTES and grant.work is not None:
            raise PermissionDenied("this needs the environment key; a sessions token serves one session")
        _require_own(grant, asked)
        return principal
    if grant.work is None:
        if route not in SESSION_ROUTES:
            raise PermissionDenied("an environment key does not open this")
    elif route not in TOKEN_ROUTES:
        raise PermissionDenied("a sessions token does not open this")
    elif not grant.live:
        raise AuthenticationFailed("the lease of this sessions token is over: its work was stopped or given to another")
    return await _in_session(deps, principal, grant, route, asked)


def require_worker(principal: Principal) -> WorkerGrant:
    """For the routes that reject API keys. Raises PermissionDenied."""
    if principal.worker is None:
        raise PermissionDenied("this needs the key of a self-hosted environment; API keys are rejected here")
    return principal.worker


def _require_own(grant: WorkerGrant, asked: Mapping[str, str]) -> None:
    if asked["environment_id"] != grant.environment:
        raise NotFound(
            f"there is no environment {asked['environment_id'][:128]!r}",
            details={"error_code": "environment_not_found"},
        )
    if grant.work is not None and asked["work_id"] != grant.work:
        raise NotFound(f"there is no work {asked['work_id'][:128]!r} of this sessions token")


async def _in_session(
    deps: Deps, principal: Principal, grant: WorkerGrant, route: tuple[str, str], asked: Mapping[str, str]
) -> Principal:
    session_id = asked.get("session_id", grant.session or "")
    if not well_formed(session_id) or (grant.session is not None and session_id != grant.session):
        raise _no_session(session_id)

    async def look(tx: AsyncConnection) -> tuple[Session, list[dict[str, Any]]]:
        found = await records.get_session(tx, principal, session_id)
        resources = await mounts.all_of(tx, principal, session_id) if route in MEMORY_ROUTES else []
        return found, resources

    session, resources = await _query(deps, look)
    if session.environment_id != grant.environment:
        raise _no_session(session_id)
    # What happens in a session is its maker's doing, above all the choice of the upstream credential.
    acting = replace(principal, workspace=session.workspace_id, key_id=session.key_id, user_id=session.user_id)
    if route in SESSION_ROUTES:
        return replace(acting, scopes=SESSION_ROUTES[route])
    # Skills and stores are checked by what the session says; where they are visible, its maker has seen to.
    acting = replace(acting, workspace=None)
    if route in SKILL_ROUTES:
        _require_skill(session, asked["skill_id"], asked["version"])
        return replace(acting, scopes=_READ)
    _require_store(resources, asked["store_id"], writes=route[0] != "GET")
    return replace(acting, scopes=MEMORY_ROUTES[route])


async def _query(deps: Deps, look: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
    return await deps.tenants.database.query(look)


def _require_skill(session: Session, skill_id: str, version: str) -> None:
    for one in session.agent.get("skills") or ():
        if one.get("skill_id") == skill_id and one.get("version") in {None, "latest", version}:
            return
    raise NotFound(f"the session's agent has no skill {skill_id[:128]!r} of version {version[:128]!r}")


def _require_store(resources: list[dict[str, Any]], store_id: str, *, writes: bool) -> None:
    for one in resources:
        if one.get("type") == "memory_store" and one.get("memory_store_id") == store_id:
            if writes and one.get("access") == "read_only":
                raise PermissionDenied(f"the session may only read memory store {store_id[:128]!r}")
            return
    raise NotFound(f"the session has no memory store {store_id[:128]!r}")


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"there is no session {session_id[:128]!r}")
