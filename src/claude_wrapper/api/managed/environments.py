"""`/v1/environments`; the work of self-hosted ones is in `work`."""

from __future__ import annotations

from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, delete, get, page_answer, post
from claude_wrapper.sessions.resources import environments
from claude_wrapper.sessions.resources.environments import Environment
from claude_wrapper.storage.pagination import Page


def _id(call: Call) -> str:
    return call.id("environment_id", "environment", error_code="environment_not_found")


async def create_environment(call: Call) -> Response:
    """A new environment."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Environment:
        return await environments.create_environment(tx, call.principal, call.scribe, fields)

    return answer((await call.write(work)).to_wire())


async def get_environment(call: Call) -> Response:
    """One environment."""

    async def work(tx: AsyncConnection) -> Environment:
        return await environments.get_environment(tx, call.principal, _id(call))

    return answer((await call.read(work)).to_wire())


async def list_environments(call: Call) -> Response:
    """A page of environments."""

    async def work(tx: AsyncConnection) -> Page[Environment]:
        archived = call.query.boolean("include_archived")
        return await environments.list_environments(tx, call.principal, call.query.page(), include_archived=archived)

    return page_answer(await call.read(work))


async def update_environment(call: Call) -> Response:
    """Change an environment."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Environment:
        return await environments.update_environment(tx, call.principal, call.scribe, _id(call), fields)

    return answer((await call.write(work)).to_wire())


async def archive_environment(call: Call) -> Response:
    """Archive an environment."""

    async def work(tx: AsyncConnection) -> Environment:
        return await environments.archive_environment(tx, call.principal, call.scribe, _id(call))

    return answer((await call.write(work)).to_wire())


async def delete_environment(call: Call) -> Response:
    """Delete an environment."""
    environment_id = _id(call)

    async def work(tx: AsyncConnection) -> None:
        await environments.delete_environment(tx, call.principal, call.scribe, environment_id)

    await call.write(work)
    return answer({"id": environment_id, "type": "environment_deleted"})


ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/environments", create_environment),
    get("/v1/environments", list_environments),
    get("/v1/environments/{environment_id}", get_environment),
    post("/v1/environments/{environment_id}", update_environment),
    delete("/v1/environments/{environment_id}", delete_environment),
    post("/v1/environments/{environment_id}/archive", archive_environment),
)
