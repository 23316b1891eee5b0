"""What the agent is told of its workspace, appended to its system prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claude_wrapper.sessions.content import places
from claude_wrapper.sessions.content.places import Seen
from claude_wrapper.sessions.content.skills import Shown


def describe(
    seen: Seen,
    *,
    resources: Sequence[Mapping[str, Any]],
    skills: Sequence[Shown],
    packages: bool,
) -> str:
    """Sections for what there is; empty when there is nothing but the outputs directory and nothing was asked for.

    `resources` as the API shows them; paths come out as the agent sees them.
    """
    parts: list[str] = []
    kinds = {kind: [one for one in resources if one["type"] == kind] for kind in ("file", "github_repository")}
    if files := kinds["file"]:
        parts.append("\n".join(["Files of this session:", *(f"- {seen.path(one['mount_path'])}" for one in files)]))
    if repositories := kinds["github_repository"]:
        lines = [f"- {seen.path(one['mount_path'])}: {one['url']}{_checkout(one)}" for one in repositories]
        parts.append("\n".join(["Git repositories of this session, already cloned:", *lines]))
    stores = [one for one in resources if one["type"] == "memory_store"]
    if stores:
        parts.append("\n".join([_MEMORY, *(_store(seen, one) for one in stores)]))
    if skills:
        lines = [f"- {one.name}: {one.description}\n  {seen.path(one.path)}" for one in skills]
        parts.append("\n".join([_SKILLS, *lines]))
    if packages:
        parts.append("Packages of this session are installed for your user; their programs are in ~/.local/bin.")
    if not parts:
        return ""
    parts.append(f"Files that you leave in {seen.path(places.OUTPUTS)} are kept and can be downloaded by the user.")
    return "\n\n".join(["# Workspace", *parts])


_MEMORY = (
    "Memory stores are directories of text files that outlive this session. Look into them before you begin; what you "
    "write into one that is not read-only is kept after each turn."
)
_SKILLS = "Skills are instructions for certain tasks. Before such a task, read the skill's file and follow it:"


def announcement(seen: Seen, paths: Sequence[str]) -> str:
    """Files that came since the last turn."""
    lines = "\n".join(f"- {seen.path(path)}" for path in paths)
    return f"<system-reminder>\nFiles were added to this session:\n{lines}\n</system-reminder>"


def _checkout(one: Mapping[str, Any]) -> str:
    checkout = one.get("checkout")
    return f" ({checkout['type']} {checkout.get('name') or checkout.get('sha')})" if checkout else ""


def _store(seen: Seen, one: Mapping[str, Any]) -> str:
    read_only = one.get("access") == "read_only"
    said = [f"- {seen.path(one['mount_path'])}{' (read-only)' if read_only else ''}: {one.get('name')}"]
    said += [str(one[field]) for field in ("description", "instructions") if one.get(field)]
    return "\n  ".join(said)
