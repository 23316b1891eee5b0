"""`/v1/agents`."""

from __future__ import annotations

from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, get, page_answer, post
from claude_wrapper.sessions.resources import agents
from claude_wrapper.sessions.resources.agents import Agent
from claude_wrapper.storage.pagination import Page


async def create_agent(call: Call) -> Response:
    """A new agent."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Agent:
        return await agents.create_agent(tx, call.principal, call.scribe, fields)

    return answer((await call.write(work)).to_wire())


async def get_agent(call: Call) -> Response:
    """One agent, at its newest or a named version."""
    version = call.query.integer("version", least=1, most=2**31 - 1)

    async def work(tx: AsyncConnection) -> Agent:
        return await agents.get_agent(tx, call.principal, call.id("agent_id", "agent"), version)

    return answer((await call.read(work)).to_wire())


async def list_agents(call: Call) -> Response:
    """A page of agents."""
    query = call.query

    async def work(tx: AsyncConnection) -> Page[Agent]:
        return await agents.list_agents(
            tx,
            call.principal,
            query.page(),
            include_archived=query.boolean("include_archived"),
            since=query.bound("created_at", "gte"),
            until=query.bound("created_at", "lte"),
        )

    return page_answer(await call.read(work))


async def update_agent(call: Call) -> Response:
    """A new version."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Agent:
        return await agents.update_agent(tx, call.principal, call.scribe, call.id("agent_id", "agent"), fields)

    return answer((await call.write(work)).to_wire())


async def archive_agent(call: Call) -> Response:
    """Archive an agent."""

    async def work(tx: AsyncConnection) -> Agent:
        return await agents.archive_agent(tx, call.principal, call.scribe, call.id("agent_id", "agent"))

    return answer((await call.write(work)).to_wire())


async def list_versions(call: Call) -> Response:
    """A page of an agent's versions."""

    async def work(tx: AsyncConnection) -> Page[Agent]:
        return await agents.list_agent_versions(tx, call.principal, call.query.page(), call.id("agent_id", "agent"))

    return page_answer(await call.read(work))


ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/agents", create_agent),
    get("/v1/agents", list_agents),
    get("/v1/agents/{agent_id}", get_agent),
    post("/v1/agents/{agent_id}", update_agent),
    post("/v1/agents/{agent_id}/archive", archive_agent),
    get("/v1/agents/{agent_id}/versions", list_versions),
)
