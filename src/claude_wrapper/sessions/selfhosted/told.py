"""What the model is told of the worker's directory: the official worker puts the agent's skills and the session's memory
stores there, and nothing else says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import NotFound
from claude_wrapper.sessions import mounts
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.resources.skillfiles import MANIFEST
from claude_wrapper.sessions.resources.skills import LATEST, SkillVersion, get_skill_version
from claude_wrapper.tenancy.principal import Principal

_READ: Final = frozenset({"read:agents"})


async def agent_told(tx: AsyncConnection, principal: Principal, session: Session) -> Mapping[str, Any]:
    """The session's agent, with a system prompt that names what its worker has for it."""
    stores = [one for one in await mounts.all_of(tx, principal, session.id) if one["type"] == "memory_store"]
    skills: list[SkillVersion] = []
    for one in session.agent.get("skills") or ():
        if one.get("type") == "custom":
            try:
                asked = replace(principal, scopes=_READ)
                skills.append(await get_skill_version(tx, asked, one["skill_id"], one.get("version") or LATEST))
            except NotFound:
                continue  # deleted meanwhile: the worker does not find it either, and goes on without
    said = described(stores, [(one.name, one.description) for one in skills])
    if not said:
        return session.agent
    return {**session.agent, "system": "\n\n".join(filter(None, (session.agent.get("system"), said)))}


def described(stores: Sequence[Mapping[str, Any]], skills: Sequence[tuple[str, str]]) -> str:
    """The section of the system prompt; empty when there is nothing. `skills`: name and description. Pure."""
    parts: list[str] = []
    if stores:
        lines = [_STORES, *(_store(one) for one in stores)]
        parts.append("\n".join(lines))
    if skills:
        parts.append(
            "\n".join([_SKILLS, *(f"- {name}: {about}\n  skills/{name}/{MANIFEST}" for name, about in skills)])
        )
    return "\n\n".join(["# Workspace", *parts]) if parts else ""


_STORES: Final = (
    "Memory stores are directories of text files that outlive this session. Look into them before you begin; what you "
    "write into one that is not read-only is kept."
)
_SKILLS: Final = (
    "Skills are instructions for certain tasks. Before such a task, read the skill's file (the path is relative to the "
    "working directory) and follow it:"
)


def _store(one: Mapping[str, Any]) -> str:
    read_only = " (read-only)" if one.get("access") == "read_only" else ""
    said = [f"- {one['mount_path']}{read_only}: {one.get('name')}"]
    said += [str(one[field]) for field in ("description", "instructions") if one.get(field)]
    return "\n  ".join(said)
