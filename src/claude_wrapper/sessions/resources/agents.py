"""Agents: definitions with versions. A change makes a new version; old ones stay readable and can be named by sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, InvalidRequest, NotFound
from claude_wrapper.sessions.resources.definitions import LATEST, changed_definition, new_definition
from claude_wrapper.sessions.resources.values import Fields, missing, wire_time
from claude_wrapper.sessions.serverbook import know
from claude_wrapper.storage.dialects import for_update
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import agent_versions, agents, skill_versions, skills
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:agents"
WRITE: Final = "write:agents"
AGENT: Final = "agent"


@dataclass(frozen=True, slots=True)
class Agent:
    """One version of an agent."""

    id: str
    version: int
    definition: Mapping[str, Any]
    """name, description, system, model, tools, mcp_servers, skills, metadata, multiagent, execution_identity; resolved."""
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    workspace_id: str | None

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        times = {"created_at": wire_time(self.created_at), "updated_at": wire_time(self.updated_at)}
        head = {"id": self.id, "type": "agent", "version": self.version}
        return {**head, **self.definition, **times, "archived_at": wire_time(self.archived_at)}

    def snapshot(self) -> dict[str, Any]:
        """What a session keeps of it: without metadata and times."""
        kept = {name: value for name, value in self.definition.items() if name != "metadata"}
        return {"id": self.id, "type": "agent", "version": self.version, **kept}


async def create_agent(tx: AsyncConnection, principal: Principal, scribe: Scribe, fields: Fields) -> Agent:
    """A new agent, at version 1. Needs `write:agents`; raises InvalidRequest naming the field."""
    principal.require(WRITE)
    definition = new_definition(fields).to_json()
    agent_id, now = scribe.ids.new(AGENT), scribe.now()
    await _look_up(tx, principal, definition, agent_id, 1)
    await tx.execute(
        sa.insert(agents).values(
            id=agent_id,
            org_id=principal.org,
            workspace_id=principal.workspace,
            version=1,
            created_at=now,
            updated_at=now,
        )
    )
    await _add_version(tx, principal, scribe, (agent_id, 1), definition)
    await scribe.record(tx, principal, "agent.create", (AGENT, agent_id), after={"name": definition["name"]})
    return await get_agent(tx, principal, agent_id)


async def get_agent(tx: AsyncConnection, principal: Principal, agent_id: str, version: int | None = None) -> Agent:
    """An agent at its newest version, or at the one named. Needs `read:agents`; raises NotFound."""
    principal.require(READ)
    wanted = agents.c.version if version is None else version
    statement = _versions(principal).where(owned(principal, agents), agents.c.id == agent_id)
    row = (await tx.execute(statement.where(agent_versions.c.version == wanted))).first()
    if row is None:
        raise missing("agent", agent_id if version is None else f"{agent_id}, version {version}")
    return _agent(row)


async def list_agents(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    include_archived: bool = False,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[Agent]:
    """Agents at their newest versions, newest first; `since` and `until` are inclusive. Needs `read:agents`."""
    principal.require(READ)
    statement = _versions(principal).where(owned(principal, agents), agent_versions.c.version == agents.c.version)
    if not include_archived:
        statement = statement.where(agents.c.archived_at.is_(None))
    if since is not None:
        statement = statement.where(agents.c.created_at >= since)
    if until is not None:
        statement = statement.where(agents.c.created_at <= until)
    return await fetch_page(tx, statement, (agents.c.created_at, agents.c.id), request, _agent)


async def list_agent_versions(
    tx: AsyncConnection, principal: Principal, request: PageRequest, agent_id: str
) -> Page[Agent]:
    """All versions of an agent, newest first. Needs `read:agents`; raises NotFound."""
    await get_agent(tx, principal, agent_id)
    statement = _versions(principal).where(owned(principal, agents), agents.c.id == agent_id)
    key = (agent_versions.c.created_at, agent_versions.c.id)
    return await fetch_page(tx, statement, key, request, _agent)


async def update_agent(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, agent_id: str, fields: Fields
) -> Agent:
    """A new version with what was sent; the present one if nothing differs. Needs `write:agents`.

    `version` in the fields is the version that the caller read: Conflict if there is a newer one. Conflict also for an
    archived agent.
    """
    principal.require(WRITE)
    expected = fields.integer("version", least=1, most=2**31 - 1)
    present = await _locked(tx, principal, agent_id)
    if present.archived_at is not None:
        raise Conflict(f"agent {agent_id!r} is archived and cannot be changed")
    if expected is not None and expected != present.version:
        raise Conflict(
            f"agent {agent_id!r} is at version {present.version}, not {expected}; read it again and repeat your change",
            details={"version": present.version},
        )
    definition = changed_definition(present.definition, fields).to_json()
    version = present.version + 1
    await _look_up(tx, principal, definition, agent_id, version)
    if definition == {**present.definition}:
        return present
    await _add_version(tx, principal, scribe, (agent_id, version), definition)
    await _set(tx, principal, agent_id, version=version, updated_at=scribe.now())
    changed = sorted(name for name in definition if definition[name] != present.definition[name])
    await scribe.record(tx, principal, "agent.update", (AGENT, agent_id), after={"version": version, "fields": changed})
    return await get_agent(tx, principal, agent_id)


async def archive_agent(tx: AsyncConnection, principal: Principal, scribe: Scribe, agent_id: str) -> Agent:
    """Archive an agent: it starts no new sessions. Doing it twice is no error. Needs `write:agents`."""
    principal.require(WRITE)
    present = await _locked(tx, principal, agent_id)
    if present.archived_at is None:
        now = scribe.now()
        await _set(tx, principal, agent_id, archived_at=now, updated_at=now)
        await scribe.record(tx, principal, "agent.archive", (AGENT, agent_id), after={"archived_at": now})
    return await get_agent(tx, principal, agent_id)


# inside ----------------------------------------------------------------------------------------------------------------


def _versions(principal: Principal) -> sa.Select[Any]:
    columns = (agent_versions.c.definition, agent_versions.c.version.label("this_version"))
    made = (agent_versions.c.created_at, agent_versions.c.id)
    joined = agents.join(agent_versions, agent_versions.c.agent_id == agents.c.id)
    return sa.select(agents, *columns, *made).select_from(joined).where(owned(principal, agent_versions))


async def _locked(tx: AsyncConnection, principal: Principal, agent_id: str) -> Agent:
    statement = sa.select(agents.c.id).where(owned(principal, agents), agents.c.id == agent_id)
    if (await tx.execute(for_update(tx.dialect.name, statement))).first() is None:
        raise missing("agent", agent_id)
    return await get_agent(tx, principal, agent_id)


async def _set(tx: AsyncConnection, principal: Principal, agent_id: str, **values: Any) -> None:
    await tx.execute(agents.update().where(owned(principal, agents), agents.c.id == agent_id).values(**values))


async def _add_version(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, this: tuple[str, int], definition: dict[str, Any]
) -> None:
    agent_id, version = this
    await tx.execute(
        sa.insert(agent_versions).values(
            agent_id=agent_id,
            version=version,
            id=scribe.ids.new("agentver"),
            org_id=principal.org,
            definition=msgspec.json.encode(definition).decode(),
            created_at=scribe.now(),
        )
    )
    await know(tx, principal, definition["mcp_servers"], scribe.now())


async def _look_up(
    tx: AsyncConnection, principal: Principal, definition: dict[str, Any], agent_id: str, version: int
) -> None:
    """Replace references by what they mean now: skills by their version, agents by theirs, `self` by this one."""
    definition["skills"] = await resolved_skills(tx, principal, definition["skills"])
    multiagent = definition["multiagent"]
    if multiagent is None:
        return
    multiagent = dict(multiagent)
    if multiagent["type"] == "coordinator":
        path = "multiagent.agents"
        multiagent["agents"] = await _roster(tx, principal, multiagent["agents"], path, (agent_id, version))
    else:
        for name in ("subagents", "workflows"):
            team = multiagent[name]
            if team["type"] == "enabled":
                path = f"multiagent.{name}.predefined_agents"
                roster = await _roster(tx, principal, team["predefined_agents"], path, (agent_id, version))
                multiagent[name] = {**team, "predefined_agents": roster}
    definition["multiagent"] = multiagent


async def resolved_skills(
    tx: AsyncConnection, principal: Principal, skills: Sequence[Mapping[str, Any]], *, field: str = "skills"
) -> list[dict[str, Any]]:
    """Skills by their version. Raises InvalidRequest, naming the field, for one that the principal does not see."""
    return [await _skill(tx, principal, skill, f"{field}[{index}]") for index, skill in enumerate(skills)]


async def _roster(
    tx: AsyncConnection, principal: Principal, roster: list[dict[str, Any]], path: str, myself: tuple[str, int]
) -> list[dict[str, Any]]:
    resolved = []
    for index, member in enumerate(roster):
        if member["type"] == "self":
            resolved.append({"type": "agent", "id": myself[0], "version": myself[1]})
        elif member["type"] == "agent" and member["id"] != myself[0]:
            try:
                other = await get_agent(tx, principal, member["id"], member.get("version"))
            except NotFound as error:
                raise InvalidRequest(error.message, field=f"{path}[{index}]") from None
            resolved.append({"type": "agent", "id": other.id, "version": other.version})
        else:
            resolved.append(member)
    return resolved


async def _skill(tx: AsyncConnection, principal: Principal, skill: Mapping[str, Any], path: str) -> dict[str, Any]:
    if skill["type"] != "custom":
        return dict(skill)
    statement = (
        sa.select(skill_versions.c.id)
        .select_from(skills.join(skill_versions, skill_versions.c.skill_id == skills.c.id))
        .where(owned(principal, skills), owned(principal, skill_versions), skills.c.id == skill["skill_id"])
    )
    wanted = skills.c.latest_version_id if skill["version"] == LATEST else skill["version"]
    found = (await tx.execute(statement.where(skill_versions.c.id == wanted))).scalar()
    if found is None:
        raise InvalidRequest(f"there is no skill {skill['skill_id']!r} at version {skill['version']!r}", field=path)
    return {**skill, "version": found}


def _agent(row: Any) -> Agent:
    mapping = row._mapping  # noqa: SLF001 (SQLAlchemy's public name for it)
    return Agent(
        id=mapping[agents.c.id],
        version=row.this_version,
        definition=msgspec.json.decode(row.definition),
        created_at=mapping[agents.c.created_at],
        updated_at=mapping[agent_versions.c.created_at] if row.this_version != row.version else row.updated_at,
        archived_at=row.archived_at,
        workspace_id=row.workspace_id,
    )
