"""Skills: directories of instructions and scripts, with versions. An archive of each version is sealed in the blob store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.sealed import opened, sealed
from claude_wrapper.sessions.resources.skillfiles import SkillFiles
from claude_wrapper.sessions.resources.values import missing, name_of, wire_time
from claude_wrapper.storage.dialects import for_update
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import skill_versions, skills
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:agents"
WRITE: Final = "write:agents"
SKILL: Final = "skill"
VERSION: Final = "skillver"
LATEST: Final = "latest"


@dataclass(frozen=True, slots=True)
class Skill:
    """One skill."""

    id: str
    display_name: str
    name: str
    latest_version_id: str
    created_at: datetime
    updated_at: datetime
    workspace_id: str | None

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "skill",
            "display_name": self.display_name,
            "latest_version_id": self.latest_version_id,
            "source": {"type": "custom"},
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
        }


@dataclass(frozen=True, slots=True)
class SkillVersion:
    """One version."""

    id: str
    skill_id: str
    name: str
    description: str
    size_bytes: int
    """Of the archive."""
    sha256: str
    created_at: datetime
    org_id: str

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "skill_version",
            "skill_id": self.skill_id,
            "name": self.name,
            "description": self.description,
            "created_at": wire_time(self.created_at),
        }


async def create_skill(
    means: ResourceMeans, principal: Principal, scribe: Scribe, files: SkillFiles, display_name: str | None
) -> Skill:
    """A new skill with its first version. Needs `write:agents`."""
    principal.require(WRITE)
    label = name_of(display_name, "display_name") if display_name is not None else files.name
    skill_id, version_id, now = scribe.ids.new(SKILL), scribe.ids.new(VERSION), scribe.now()
    archive = await asyncio.to_thread(files.archive)

    async def add(tx: AsyncConnection) -> Skill:
        await tx.execute(
            sa.insert(skills).values(
                id=skill_id,
                org_id=principal.org,
                workspace_id=principal.workspace,
                display_name=label,
                name=files.name,
                latest_version_id=version_id,
                created_at=now,
                updated_at=now,
            )
        )
        await _add_version(tx, principal, scribe, (skill_id, version_id), (files, archive))
        await scribe.record(tx, principal, "skill.create", (SKILL, skill_id), after={"name": files.name})
        return await get_skill(tx, principal, skill_id)

    await _keep(means, principal, version_id, archive)
    try:
        return await means.db.run(add)
    except BaseException:
        await means.blobs.delete(_key(principal.org, version_id))
        raise


async def create_skill_version(
    means: ResourceMeans, principal: Principal, scribe: Scribe, skill_id: str, files: SkillFiles
) -> SkillVersion:
    """A new version of a skill, which keeps its name. Needs `write:agents`; raises NotFound, InvalidRequest."""
    principal.require(WRITE)
    version_id = scribe.ids.new(VERSION)

    async def read(tx: AsyncConnection) -> Skill:
        return await get_skill(tx, principal, skill_id)

    skill = await means.db.query(read)
    if skill.name != files.name:
        raise InvalidRequest(f"the skill's name is {skill.name!r} and cannot be changed", field="files.SKILL.md.name")
    archive = await asyncio.to_thread(files.archive)

    async def add(tx: AsyncConnection) -> SkillVersion:
        await _locked(tx, principal, skill_id)
        await _add_version(tx, principal, scribe, (skill_id, version_id), (files, archive))
        change = skills.update().where(owned(principal, skills), skills.c.id == skill_id)
        await tx.execute(change.values(latest_version_id=version_id, updated_at=scribe.now()))
        await scribe.record(tx, principal, "skill.version", (SKILL, skill_id), after={"version": version_id})
        return await get_skill_version(tx, principal, skill_id, version_id)

    await _keep(means, principal, version_id, archive)
    try:
        return await means.db.run(add)
    except BaseException:
        await means.blobs.delete(_key(principal.org, version_id))
        raise


async def get_skill(tx: AsyncConnection, principal: Principal, skill_id: str) -> Skill:
    """One skill. Needs `read:agents`; raises NotFound."""
    principal.require(READ)
    row = (await tx.execute(sa.select(skills).where(owned(principal, skills), skills.c.id == skill_id))).first()
    if row is None:
        raise missing("skill", skill_id)
    return _skill(row)


async def list_skills(tx: AsyncConnection, principal: Principal, request: PageRequest) -> Page[Skill]:
    """Skills, newest first. Needs `read:agents`."""
    principal.require(READ)
    statement = sa.select(skills).where(owned(principal, skills))
    return await fetch_page(tx, statement, (skills.c.created_at, skills.c.id), request, _skill)


async def get_skill_version(tx: AsyncConnection, principal: Principal, skill_id: str, version_id: str) -> SkillVersion:
    """One version, by id or as `latest`. Needs `read:agents`; raises NotFound."""
    skill = await get_skill(tx, principal, skill_id)
    wanted = skill.latest_version_id if version_id == LATEST else version_id
    statement = sa.select(skill_versions).where(
        owned(principal, skill_versions), skill_versions.c.skill_id == skill_id, skill_versions.c.id == wanted
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise missing("skill version", version_id)
    return _version(row)


async def list_skill_versions(
    tx: AsyncConnection, principal: Principal, request: PageRequest, skill_id: str
) -> Page[SkillVersion]:
    """The versions of a skill, newest first. Needs `read:agents`; raises NotFound."""
    await get_skill(tx, principal, skill_id)
    statement = sa.select(skill_versions).where(owned(principal, skill_versions), skill_versions.c.skill_id == skill_id)
    key = (skill_versions.c.created_at, skill_versions.c.id)
    return await fetch_page(tx, statement, key, request, _version)


async def open_skill_version(means: ResourceMeans, version: SkillVersion) -> AsyncIterator[bytes]:
    """The archive of a version that `get_skill_version` returned: a zip with one directory. Raises NotFound."""
    frames = await means.blobs.stream(_key(version.org_id, version.id))
    if frames is None:
        raise missing("skill version", version.id)
    return opened(means.keys, version.org_id, skill_versions.name, version.id, frames)


async def delete_skill(means: ResourceMeans, principal: Principal, scribe: Scribe, skill_id: str) -> None:
    """Delete a skill with all its versions. Needs `write:agents`; raises NotFound."""
    principal.require(WRITE)

    async def delete(tx: AsyncConnection) -> list[str]:
        await get_skill(tx, principal, skill_id)
        inside = sa.select(skill_versions.c.id).where(
            owned(principal, skill_versions), skill_versions.c.skill_id == skill_id
        )
        versions = list((await tx.execute(inside)).scalars())
        await tx.execute(skills.delete().where(owned(principal, skills), skills.c.id == skill_id))
        await scribe.record(tx, principal, "skill.delete", (SKILL, skill_id))
        return versions

    gone = await means.db.run(delete)
    await means.blobs.delete(*(_key(principal.org, version) for version in gone))


async def delete_skill_version(
    means: ResourceMeans, principal: Principal, scribe: Scribe, skill_id: str, version_id: str
) -> str:
    """Delete one version; its id. The only one cannot be deleted (Conflict): delete the skill."""
    principal.require(WRITE)

    async def delete(tx: AsyncConnection) -> str:
        await _locked(tx, principal, skill_id)
        gone = await get_skill_version(tx, principal, skill_id, version_id)
        inside = (owned(principal, skill_versions), skill_versions.c.skill_id == skill_id)
        others = sa.select(skill_versions.c.id).where(
            owned(principal, skill_versions), *inside, skill_versions.c.id != gone.id
        )
        newest = others.order_by(skill_versions.c.created_at.desc(), skill_versions.c.id.desc()).limit(1)
        latest = (await tx.execute(newest)).scalar()
        if latest is None:
            raise Conflict("a skill has at least one version; delete the skill instead")
        here = skill_versions.delete().where(owned(principal, skill_versions), skill_versions.c.id == gone.id)
        await tx.execute(here)
        change = skills.update().where(owned(principal, skills), skills.c.id == skill_id)
        await tx.execute(change.values(latest_version_id=latest, updated_at=scribe.now()))
        await scribe.record(tx, principal, "skill.version_delete", (SKILL, skill_id), after={"version": gone.id})
        return gone.id

    gone = await means.db.run(delete)
    await means.blobs.delete(_key(principal.org, gone))
    return gone


# inside ----------------------------------------------------------------------------------------------------------------


async def _keep(means: ResourceMeans, principal: Principal, version_id: str, archive: bytes) -> None:
    async def whole() -> AsyncIterator[bytes]:
        yield archive

    keys = await means.keys.of(principal.org)
    await means.blobs.put(_key(principal.org, version_id), sealed(keys, skill_versions.name, version_id, whole()))


async def _add_version(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, place: tuple[str, str], content: tuple[SkillFiles, bytes]
) -> None:
    files, archive = content
    await tx.execute(
        sa.insert(skill_versions).values(
            id=place[1],
            org_id=principal.org,
            skill_id=place[0],
            name=files.name,
            description=files.description,
            size_bytes=len(archive),
            sha256=hashlib.sha256(archive).hexdigest(),
            created_at=scribe.now(),
        )
    )


async def _locked(tx: AsyncConnection, principal: Principal, skill_id: str) -> Skill:
    statement = sa.select(skills.c.id).where(owned(principal, skills), skills.c.id == skill_id)
    await tx.execute(for_update(tx.dialect.name, statement))
    return await get_skill(tx, principal, skill_id)


def _key(org: str, version_id: str) -> str:
    return f"skills/{org}/{version_id}"


def _skill(row: Any) -> Skill:
    return Skill(
        id=row.id,
        display_name=row.display_name,
        name=row.name,
        latest_version_id=row.latest_version_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
        workspace_id=row.workspace_id,
    )


def _version(row: Any) -> SkillVersion:
    return SkillVersion(
        id=row.id,
        skill_id=row.skill_id,
        name=row.name,
        description=row.description,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=row.created_at,
        org_id=row.org_id,
    )
