"""The skills of an agent, unpacked where it can read them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest, RequestTooLarge, WrapperError
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.acting import Acting
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.skillfiles import MANIFEST, MAX_BYTES, SkillFiles, read_skill
from claude_wrapper.sessions.resources.skills import LATEST, SkillVersion, get_skill_version, open_skill_version

_TOP: Final = places.relative(places.SKILLS)
_EXECUTABLE: Final = b"#!"


@dataclass(frozen=True, slots=True)
class Shown:
    """A skill as the agent is told of it."""

    name: str
    description: str

    @property
    def path(self) -> str:
        """Its first file."""
        return f"{places.SKILLS}/{self.name}/{MANIFEST}"


async def put_skills(
    acting: Acting, wanted: Sequence[Mapping[str, Any]], work: Path, manifest: Manifest
) -> tuple[list[Shown], list[str]]:
    """Unpack what is not there yet and take away what is no longer wanted: the skills, and what went wrong."""
    shown: list[Shown] = []
    told: list[str] = []
    for one in wanted:
        try:
            version = await _version(acting, one)
            if any(version.name == other.name for other in shown):
                raise InvalidRequest(f"there is a skill named {version.name!r} already")
            if manifest.skills.get(version.name) != version.id:
                files = await _unpacked(acting.means, version)
                await asyncio.to_thread(_write, work, files)
                manifest.skills[version.name] = version.id
            shown.append(Shown(version.name, version.description))
        except WrapperError as error:
            told.append(f"skill {one.get('skill_id')}: {error.message}")
    for name in set(manifest.skills) - {one.name for one in shown}:
        del manifest.skills[name]
        try:
            await asyncio.to_thread(trees.remove, work, f"{_TOP}/{name}")
        except InvalidRequest as error:  # the note that names it is the agent's to change
            told.append(f"skill {name[:128]!r} is not removed: {error.message}")
    return shown, told


async def _version(acting: Acting, wanted: Mapping[str, Any]) -> SkillVersion:
    if wanted.get("type") != "custom":
        raise InvalidRequest("Anthropic's own skills are not on this server; upload a skill and name that")

    async def read(tx: AsyncConnection) -> SkillVersion:
        wanted_version = str(wanted.get("version") or LATEST)
        return await get_skill_version(tx, acting.principal, str(wanted["skill_id"]), wanted_version)

    return await acting.read(read)


async def _unpacked(means: ResourceMeans, version: SkillVersion) -> SkillFiles:
    archive = bytearray()
    async for piece in await open_skill_version(means, version):
        archive += piece
        if len(archive) > 2 * MAX_BYTES:
            raise RequestTooLarge("the archive is too large")
    # Checked when it was uploaded, and again: its names become paths here.
    return await asyncio.to_thread(read_skill, [(f"{version.name}.zip", bytes(archive))])


def _write(work: Path, files: SkillFiles) -> None:
    trees.remove(work, f"{_TOP}/{files.name}")
    for path, content in files.files.items():
        mode = 0o755 if content.startswith(_EXECUTABLE) else 0o644
        trees.write(work, f"{_TOP}/{files.name}/{path}", content, mode=mode)
