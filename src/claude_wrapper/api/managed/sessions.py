"""`/v1/sessions`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, Query, answer, delete, get, post
from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.sessions import mounts, records
from claude_wrapper.sessions.managed import WRITE
from claude_wrapper.sessions.records import Filter, Session
from claude_wrapper.sessions.resources.agents import get_agent, resolved_skills
from claude_wrapper.sessions.resources.credentials import require_usable
from claude_wrapper.sessions.resources.definitions import overridden
from claude_wrapper.sessions.resources.environments import environment_for_session
from claude_wrapper.sessions.resources.values import Fields, id_of, metadata_of
from claude_wrapper.sessions.sessionfields import MAX_VAULTS, NewSession, budget_of
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.wire.managed_input import check_event_list

_CREATE: Final = (
    *("agent", "environment_id", "title", "metadata", "vault_ids", "resources", "initial_events", "budget"),
)
_INITIAL: Final = frozenset({"user.message", "user.define_outcome"})


async def create_session(call: Call) -> Response:
    """A new session of an agent in an environment."""
    call.principal.require(WRITE)
    call.deps.refuse_when_draining()
    fields = (await call.fields()).only(*_CREATE)
    for name in ("agent", "environment_id"):
        if not fields.given(name):
            raise InvalidRequest("is required", field=name)
    mounted = mounts.read_resources(fields)

    async def work(tx: AsyncConnection) -> NewSession:
        agent = await _agent(tx, call, fields)
        environment_id = id_of(fields.data["environment_id"], "environment_id", "env")
        environment = await environment_for_session(tx, call.principal, environment_id)
        complete = await mounts.check(tx, call.principal, mounted, call.scribe)
        wire = environment.to_wire()
        if wire["config"].get("type") == "self_hosted":
            _require_mountable(mounted)
        vault_ids = tuple(id_of(one, path, "vlt") for one, path in fields.items("vault_ids", most=MAX_VAULTS))
        await require_usable(tx, call.principal, vault_ids, "vault_ids")
        given = fields.data.get("initial_events")
        return NewSession(
            agent=agent,
            environment_id=environment_id,
            environment=wire["config"],
            title=fields.maybe_text("title", most=512),
            metadata=metadata_of(fields),
            vault_ids=vault_ids,
            budget=budget_of(fields),
            initial_events=check_event_list(given, field="initial_events", allowed=_INITIAL) if given else (),
            mounts=complete,
        )

    new = await call.read(work)
    if not new.initial_events:
        return answer(await _shown(call, await _created(call, new)))
    # They start a turn, as events that are sent do: the same limits hold.
    async with call.deps.tenants.admission.admit(call.principal):
        return answer(await _shown(call, await _created(call, new)))


async def _created(call: Call, new: NewSession) -> Session:
    await mounts.keep_tokens(call.means.secrets, call.principal, new.mounts)
    try:
        return await call.deps.sessions.create(call.principal, new)
    except BaseException:
        await mounts.forget_tokens(call.means.secrets, call.principal, [one.id for one in new.mounts if one.token])
        raise


async def _agent(tx: AsyncConnection, call: Call, fields: Fields) -> dict[str, Any]:
    """The snapshot that the session keeps: an agent's newest or a named version, with the session's own overrides."""
    given = fields.data["agent"]
    if isinstance(given, str):
        found = await get_agent(tx, call.principal, id_of(given, "agent", "agent"))
        asked = None
    else:
        asked = fields.object("agent")
        kind = asked.one_of("type", "agent", "agent_with_overrides")
        overrides = ("model", "system", "tools", "mcp_servers", "skills") if kind == "agent_with_overrides" else ()
        asked.only("type", "id", "version", *overrides)
        agent_id = id_of(asked.data.get("id"), "agent.id", "agent")
        found = await get_agent(tx, call.principal, agent_id, asked.integer("version", least=1, most=2**31 - 1))
    if found.archived_at is not None:
        raise Conflict(f"agent {found.id} is archived and starts no sessions")
    snapshot = found.snapshot()
    if asked is None:
        return snapshot
    values = overridden(snapshot, asked)
    if asked.given("skills"):
        # What the session may read later, through its worker too, is decided by what its maker sees now.
        values["skills"] = await resolved_skills(tx, call.principal, values["skills"], field="agent.skills")
    return values


def _require_mountable(mounted: Sequence[mounts.Mount]) -> None:
    """The official worker puts memory stores into its directory, and nothing else."""
    for one in mounted:
        if one.type != "memory_store":
            raise InvalidRequest(
                f"a {one.type} cannot be mounted into a self-hosted environment: its worker mounts memory stores alone",
                field=f"{one.path}.type",
            )


async def get_session(call: Call) -> Response:
    """One session."""
    return answer(await _shown(call, await call.deps.sessions.get(call.principal, _id(call))))


async def list_sessions(call: Call) -> Response:
    """A page of sessions."""
    query = call.query
    statuses = frozenset(query.many("statuses") or ())
    if unknown := sorted(statuses - records.STATUSES):
        raise InvalidRequest(f"{unknown[0][:64]!r} is no status", field="statuses")
    wanted = Filter(
        agent_id=query.text("agent_id"),
        agent_version=query.integer("agent_version", least=1, most=2**31 - 1),
        statuses=statuses,
        include_archived=query.boolean("include_archived"),
        created=bounds(query),
    )
    page = query.page()
    ordered = PageRequest(page.limit, cursor=page.cursor, newest_first=query.one_of("order", "asc", "desc") != "asc")
    if query.text("deployment_id") or query.text("memory_store_id"):
        return answer({"data": [], "next_page": None, "prev_page": None})
    found = await call.deps.sessions.page(call.principal, wanted, ordered)
    data = [await _shown(call, one) for one in found.data]
    return answer({"data": data, "next_page": found.next_page, "prev_page": found.prev_page})


async def update_session(call: Call) -> Response:
    """Change a session's title, metadata, budget, tools or servers."""
    fields = await call.fields()
    return answer(await _shown(call, await call.deps.sessions.update(call.principal, _id(call), fields)))


async def archive_session(call: Call) -> Response:
    """End a session and keep it readable."""
    return answer(await _shown(call, await call.deps.sessions.archive(call.principal, _id(call))))


async def delete_session(call: Call) -> Response:
    """Forget a session."""
    call.principal.require(WRITE)
    session = await call.deps.sessions.get(call.principal, _id(call))

    async def work(tx: AsyncConnection) -> list[str]:
        return [one["id"] for one in await mounts.all_of(tx, call.principal, session.id)]

    resources = await call.read(work)
    await call.deps.sessions.delete(call.principal, session.id)
    await mounts.forget_tokens(call.means.secrets, call.principal, resources)
    return answer({"id": _id(call), "type": "session_deleted"})


async def list_resources(call: Call) -> Response:
    """The files, repositories and memory stores of a session."""
    session = await call.deps.sessions.get(call.principal, _id(call))
    page = call.query.page(most=1000)

    async def work(tx: AsyncConnection) -> Any:
        return await mounts.page_of(tx, call.principal, session.id, page, everything=call.query.text("limit") is None)

    found = await call.read(work)
    return answer({"data": list(found.data), "next_page": found.next_page})


async def add_resource(call: Call) -> Response:
    """Give a session another file."""
    call.principal.require(WRITE)
    mounted = mounts.read_resource(await call.fields(), only="file")
    session = await call.deps.sessions.get(call.principal, _id(call))
    if session.ended:
        raise Conflict(f"session {session.id} has ended and takes no resources")

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        present = await mounts.all_of(tx, call.principal, session.id)
        if len(present) >= mounts.MAX_RESOURCES:
            raise Conflict(f"session {session.id} has {mounts.MAX_RESOURCES} resources, which is the most")
        [complete] = await mounts.check(tx, call.principal, [mounted], call.scribe, present=present)
        return await mounts.add(tx, call.principal, session.id, complete, now=call.deps.clock.now())

    return answer(await call.write(work))


async def get_resource(call: Call) -> Response:
    """One resource of a session."""
    session = await call.deps.sessions.get(call.principal, _id(call))

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        return await mounts.one(tx, call.principal, session.id, call.request.path_params["resource_id"])

    return answer(await call.read(work))


async def update_resource(call: Call) -> Response:
    """Change a repository's token: what is cloned from now on is cloned with it."""
    call.principal.require(WRITE)
    fields = (await call.fields()).only("authorization_token")
    token = mounts.read_token(fields.text("authorization_token", most=4096), fields)
    session = await call.deps.sessions.get(call.principal, _id(call))
    resource_id = str(call.request.path_params["resource_id"])

    async def read(tx: AsyncConnection) -> dict[str, Any]:
        return await mounts.one(tx, call.principal, session.id, resource_id)

    resource = await call.read(read)
    if resource["type"] != "github_repository":
        raise InvalidRequest("only repositories have a token", field="authorization_token")
    given = mounts.Mount(resource["type"], resource, "", id=resource_id, token=token)
    await mounts.keep_tokens(call.means.secrets, call.principal, [given])

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        await mounts.touch(tx, call.principal, session.id, resource_id, call.deps.clock.now())
        return await mounts.one(tx, call.principal, session.id, resource_id)

    return answer(await call.write(work))


async def delete_resource(call: Call) -> Response:
    """Take a resource away."""
    call.principal.require(WRITE)
    session = await call.deps.sessions.get(call.principal, _id(call))
    resource_id = str(call.request.path_params["resource_id"])

    async def work(tx: AsyncConnection) -> None:
        await mounts.remove(tx, call.principal, session.id, resource_id)

    await call.write(work)
    await mounts.forget_tokens(call.means.secrets, call.principal, [resource_id])
    return answer({"id": resource_id, "type": "session_resource_deleted"})


def _id(call: Call) -> str:
    return call.id("session_id", "session")


async def _shown(call: Call, session: Session) -> dict[str, Any]:
    async def work(tx: AsyncConnection) -> list[dict[str, Any]]:
        return await mounts.all_of(tx, call.principal, session.id)

    return session.to_wire(call.deps.clock.now(), await call.read(work))


def bounds(query: Query) -> dict[str, datetime]:
    """`created_at[gt|gte|lt|lte]`."""
    found = {side: query.bound("created_at", side) for side in ("gt", "gte", "lt", "lte")}
    return {side: at for side, at in found.items() if at is not None}


ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/sessions", create_session),
    get("/v1/sessions", list_sessions),
    get("/v1/sessions/{session_id}", get_session),
    post("/v1/sessions/{session_id}", update_session),
    delete("/v1/sessions/{session_id}", delete_session),
    post("/v1/sessions/{session_id}/archive", archive_session),
    get("/v1/sessions/{session_id}/resources", list_resources),
    post("/v1/sessions/{session_id}/resources", add_resource),
    get("/v1/sessions/{session_id}/resources/{resource_id}", get_resource),
    post("/v1/sessions/{session_id}/resources/{resource_id}", update_resource),
    delete("/v1/sessions/{session_id}/resources/{resource_id}", delete_resource),
)
