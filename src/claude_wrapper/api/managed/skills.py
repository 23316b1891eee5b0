"""`/v1/skills` and their versions."""

from __future__ import annotations

import asyncio
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.files import streamed
from claude_wrapper.api.managed.multipart import OVERHEAD, Multipart
from claude_wrapper.api.managed.resource_common import Call, answer, delete, get, page_answer, post
from claude_wrapper.errors import RequestTooLarge
from claude_wrapper.sessions.resources import skills
from claude_wrapper.sessions.resources.skillfiles import MAX_BYTES, MAX_FILES, SkillFiles, read_skill
from claude_wrapper.sessions.resources.skills import Skill, SkillVersion
from claude_wrapper.storage.pagination import MAX_LIMIT, Page


def _skill(call: Call) -> str:
    return call.id("skill_id", "skill")


def _version(call: Call) -> str:
    value = str(call.request.path_params["version"])
    return value if value == skills.LATEST else call.id("version", "skill version")


async def _upload(call: Call) -> tuple[SkillFiles, str | None]:
    """The checked files and the label."""
    call.principal.require(skills.WRITE)
    body = Multipart(call.request, limit=MAX_BYTES + OVERHEAD, max_parts=MAX_FILES + 8)
    uploads: list[tuple[str, bytes]] = []
    label: str | None = None
    size = 0
    async for part in body.parts():
        if part.name == "files":
            content = bytearray()
            async for piece in body.content():
                size += len(piece)
                if size > MAX_BYTES:
                    raise RequestTooLarge(f"the files of a skill have at most {MAX_BYTES} bytes together")
                content += piece
            uploads.append((part.filename or "", bytes(content)))
        elif part.name == "display_name":
            label = await body.text(part.name) or None
    return await asyncio.to_thread(read_skill, uploads), label


async def create_skill(call: Call) -> Response:
    """A new skill."""
    uploaded, label = await _upload(call)
    made = await skills.create_skill(call.means, call.principal, call.scribe, uploaded, label)
    return answer(made.to_wire())


async def get_skill(call: Call) -> Response:
    """One skill."""

    async def work(tx: AsyncConnection) -> Skill:
        return await skills.get_skill(tx, call.principal, _skill(call))

    return answer((await call.read(work)).to_wire())


async def list_skills(call: Call) -> Response:
    """A page of skills; there are none from anybody but the tenant itself."""
    request = call.query.page(most=MAX_LIMIT)
    source = call.query.one_of("source", "custom", "anthropic")

    async def work(tx: AsyncConnection) -> Page[Skill]:
        return await skills.list_skills(tx, call.principal, request)

    return page_answer(Page(()) if source == "anthropic" else await call.read(work))


async def delete_skill(call: Call) -> Response:
    """Delete a skill with its versions."""
    skill_id = _skill(call)
    await skills.delete_skill(call.means, call.principal, call.scribe, skill_id)
    return answer({"id": skill_id, "type": "skill_deleted"})


async def create_version(call: Call) -> Response:
    """A new version of a skill."""
    skill_id = _skill(call)
    uploaded, _ = await _upload(call)
    made = await skills.create_skill_version(call.means, call.principal, call.scribe, skill_id, uploaded)
    return answer(made.to_wire())


async def get_version(call: Call) -> Response:
    """One version."""
    return answer((await _found(call)).to_wire())


async def _found(call: Call) -> SkillVersion:
    async def work(tx: AsyncConnection) -> SkillVersion:
        return await skills.get_skill_version(tx, call.principal, _skill(call), _version(call))

    return await call.read(work)


async def list_versions(call: Call) -> Response:
    """A page of a skill's versions."""
    request = call.query.page(most=MAX_LIMIT)

    async def work(tx: AsyncConnection) -> Page[SkillVersion]:
        return await skills.list_skill_versions(tx, call.principal, request, _skill(call))

    return page_answer(await call.read(work))


async def delete_version(call: Call) -> Response:
    """Delete a version."""
    gone = await skills.delete_skill_version(call.means, call.principal, call.scribe, _skill(call), _version(call))
    return answer({"id": gone, "type": "skill_version_deleted"})


async def download_version(call: Call) -> Response:
    """A version's files as a zip."""
    version = await _found(call)
    pieces = await skills.open_skill_version(call.means, version)
    headers = {
        "content-length": str(version.size_bytes),
        "content-disposition": f'attachment; filename="{version.name}.zip"',
    }
    return await streamed(pieces, "application/zip", headers)


_ONE: Final = "/v1/skills/{skill_id}"

ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/skills", create_skill),
    get("/v1/skills", list_skills),
    get(_ONE, get_skill),
    delete(_ONE, delete_skill),
    post(_ONE + "/versions", create_version),
    get(_ONE + "/versions", list_versions),
    get(_ONE + "/versions/{version}", get_version),
    delete(_ONE + "/versions/{version}", delete_version),
    get(_ONE + "/versions/{version}/content", download_version),
)
