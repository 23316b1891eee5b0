"""A memory store and its directory in a workspace, brought together before and after a turn.

Both may have changed since they last agreed: the directory by the agent, the store by another session or by a caller.
What changed on one side alone is carried to the other. What changed on both stays as the store has it; the agent's text
is kept as a memory beside it, and the session is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import (
    InvalidRequest,
    MemoryPathConflict,
    MemoryPreconditionFailed,
    NotFound,
    WrapperError,
)
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.acting import Acting
from claude_wrapper.sessions.resources import memory
from claude_wrapper.sessions.resources.memorystores import get_memory_store
from claude_wrapper.sessions.resources.memoryversions import Actor
from claude_wrapper.sessions.resources.values import Fields
from claude_wrapper.storage.tables.resources import memories
from claude_wrapper.tenancy.principal import Principal, owned

MAX_BYTES: Final = 64 * 2**20
"""Of all memories of a store together, while it is mounted."""
_MAX_FILES: Final = 2 * memory.MAX_MEMORIES
_FETCHED: Final = 200
_ROUNDS: Final = 3
_TOLD: Final = 20
"""Differences that one report names."""


class Do(StrEnum):
    """What becomes of one path."""

    TAKE = "take"
    """The directory gets what the store has, also nothing."""
    GIVE = "give"
    """The store gets what the directory has, also nothing."""
    KEEP_BOTH = "keep_both"
    """The directory gets what the store has; the agent's text becomes a memory beside it."""
    PUT_BACK = "put_back"
    """The agent changed what it may only read."""
    RESTORE = "restore"
    """The agent deleted what somebody else changed."""


_SAID: Final[Mapping[Do, str]] = {
    Do.PUT_BACK: "this store is read-only here; the change was put back",
    Do.RESTORE: "was deleted here and changed by somebody else; it is there again",
}


def decide(base: str | None, here: str | None, there: str | None, *, read_only: bool) -> Do | None:
    """What to do with a path, by the hashes of its content (None: absent) when both agreed, in the directory, and in the
    store. Pure."""
    if here == there:
        return None
    if here == base:
        return Do.TAKE
    if read_only:
        return Do.PUT_BACK
    if there == base:
        return Do.GIVE
    return Do.RESTORE if here is None else Do.KEEP_BOTH


def plan(
    base: Mapping[str, str], here: Mapping[str, str], there: Mapping[str, str], *, read_only: bool
) -> dict[str, Do]:
    """`decide` for every path, in order; paths that need nothing are left out. Pure."""
    found = {
        path: decide(base.get(path), here.get(path), there.get(path), read_only=read_only)
        for path in sorted(base.keys() | here.keys() | there.keys())
    }
    return {path: what for path, what in found.items() if what is not None}


def conflict_path(path: str, session: str, taken: Mapping[str, Any]) -> str:
    """Where the agent's text is kept beside the store's. Pure."""
    head, slash, name = path.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    tail = session[-8:]
    for number in range(1, 100):
        mark = f".conflict-{tail}" + (f"-{number}" if number > 1 else "")
        candidate = f"{head}{slash}{stem}{mark}{dot}{ending}" if stem else f"{head}{slash}{name}{mark}"
        if candidate not in taken:
            return candidate
    raise InvalidRequest(f"{path}: too many conflicts are kept beside it already")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A store as a session mounts it."""

    store_id: str
    slug: str
    read_only: bool

    @property
    def directory(self) -> str:
        """Below the workspace."""
        return f"{places.relative(places.MEMORY)}/{self.slug}"


@dataclass(slots=True)
class _Round:
    """One look at both sides, and what came of it."""

    work: Path
    mounted: Mounted
    texts: Mapping[str, str]
    stored: Mapping[str, tuple[str, str, int]]
    """Id, hash and size by path."""
    agreed: dict[str, str]
    told: list[str]
    again: bool = False
    """Somebody changed the store meanwhile, or something was kept beside: both have to be looked at once more."""

    def tell(self, message: str) -> None:
        if message not in self.told:
            self.told.append(message)


class MemorySync:
    """Brings stores and directories of one session together."""

    def __init__(self, acting: Acting) -> None:
        self._acting = acting
        self._actor = Actor("session_actor", acting.session)

    async def sync(self, work: Path, mounted: Mounted, base: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """What both agree on now (hash by path), and what the session has to be told.

        Raises NotFound for a store that is gone, InvalidRequest and RequestTooLarge for one that cannot be mounted.
        """
        told: list[str] = []
        if not await asyncio.to_thread(trees.exists, work, mounted.directory):
            # A directory that is gone as a whole says nothing about what was in it.
            base = {}
            await asyncio.to_thread(trees.make_directory, work, mounted.directory)
        for _ in range(_ROUNDS):
            done = await self._once(work, mounted, base, told)
            if not done.again:
                break
        return done.agreed, told[:_TOLD] + ([f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else [])

    async def _once(self, work: Path, mounted: Mounted, base: Mapping[str, str], told: list[str]) -> _Round:
        principal = self._acting.principal
        stored = await self._acting.read(lambda tx: _index(tx, principal, mounted.store_id))
        local = await asyncio.to_thread(
            trees.texts, work, mounted.directory, most=_MAX_FILES, bytes_each=memory.MAX_CONTENT, bytes_all=MAX_BYTES
        )
        here = {path: trees.digest(text) for path, text in local.found.items()}
        there = {path: sha for path, (_, sha, _) in stored.items()}
        agreed = {path: sha for path, sha in there.items() if here.get(path) == sha}
        now = _Round(work, mounted, local.found, stored, agreed, told)
        for path, reason in local.left_out.items():
            now.tell(f"{path}: is not kept: {reason}")
        taken: list[str] = []
        for path, what in plan(base, here, there, read_only=mounted.read_only).items():
            if what is Do.GIVE and path in local.left_out:
                # It is there, and is no memory: the store keeps what it had.
                now.agreed |= {path: base[path]} if path in base else {}
            elif what in {Do.GIVE, Do.KEEP_BOTH}:
                await self._bring(now, path, what, here | there)
            elif what in _SAID:
                now.tell(f"{path}: {_SAID[what]}")
            if what is not Do.GIVE:
                taken.append(path)
        if taken:
            now.agreed |= await self._take(work, mounted, taken, stored)
        return now

    async def _bring(self, now: _Round, path: str, what: Do, taken: Mapping[str, str]) -> None:
        """The agent's text, or its absence, into the store: to its place, or beside what somebody else wrote there."""
        text = now.texts.get(path)
        target = path if what is Do.GIVE else conflict_path(path, self._acting.session, taken)
        try:
            await self._give(now.mounted.store_id, target, text, now.stored.get(target))
        except MemoryPreconditionFailed:
            now.again = True
        except MemoryPathConflict as error:
            # Made by somebody else a moment ago, or a file where a directory of memories is.
            now.again = error.details.get("conflicting_path") == target
            if not now.again:
                now.tell(f"{path}: is not kept: {error.message}")
        except NotFound:
            now.again = True
        except WrapperError as error:
            now.tell(f"{path}: is not kept: {error.message}")
        else:
            if what is Do.KEEP_BOTH:
                now.again = True  # the text that was kept beside it comes into the directory
                now.tell(f"{path}: was changed by somebody else too, and that stands; this session's text is {target}")
            elif text is not None:
                now.agreed[path] = trees.digest(text)

    async def _give(self, store_id: str, path: str, text: str | None, present: tuple[str, str, int] | None) -> None:
        """Change the store if it is as it was seen. Raises as the three changes do."""
        principal, scribe, actor = self._acting.principal, self._acting.scribe, self._actor

        async def change(tx: AsyncConnection) -> None:
            if present is None:
                fields = Fields({"path": path, "content": text or ""}, "memory")
                await memory.create_memory(tx, principal, scribe, store_id, fields, actor=actor)
                return
            place = (store_id, present[0])
            if text is None:
                await memory.delete_memory(tx, principal, scribe, place, expected_sha256=present[1], actor=actor)
                return
            expected = {"type": "content_sha256", "content_sha256": present[1]}
            fields = Fields({"content": text, "precondition": expected}, "memory")
            await memory.update_memory(tx, principal, scribe, place, fields, actor=actor)

        await self._acting.means.db.run(change)

    async def _take(self, work: Path, mounted: Mounted, paths: list[str], stored: Mapping[str, Any]) -> dict[str, str]:
        """Make these paths of the directory what the store has; the hashes of what was written."""
        principal = self._acting.principal
        agreed: dict[str, str] = {}
        for path in (one for one in paths if one not in stored):
            await asyncio.to_thread(trees.remove, work, mounted.directory + path)
        for some in _groups([path for path in paths if path in stored], _FETCHED):
            contents = await self._acting.read(
                partial(_contents, principal=principal, store=mounted.store_id, paths=some)
            )
            for path, text in contents.items():
                await asyncio.to_thread(_replace, work, mounted.directory + path, text)
                agreed[path] = trees.digest(text)
        return agreed


async def _index(tx: AsyncConnection, principal: Principal, store_id: str) -> dict[str, tuple[str, str, int]]:
    """Id, hash and size by path. Raises NotFound, and InvalidRequest for a store that is too large to be mounted."""
    await get_memory_store(tx, principal, store_id)
    columns = (memories.c.path, memories.c.id, memories.c.content_sha256, memories.c.content_size_bytes)
    query = sa.select(*columns).where(owned(principal, memories), memories.c.store_id == store_id)
    rows = list(await tx.execute(query))
    total = sum(row.content_size_bytes for row in rows)
    if total > MAX_BYTES:
        raise InvalidRequest(f"memory store {store_id} has {total} bytes; one of at most {MAX_BYTES} can be mounted")
    return {row.path: (row.id, row.content_sha256, row.content_size_bytes) for row in rows}


async def _contents(tx: AsyncConnection, principal: Principal, store: str, paths: list[str]) -> dict[str, str]:
    query = sa.select(memories.c.path, memories.c.content).where(
        owned(principal, memories), memories.c.store_id == store, memories.c.path.in_(paths)
    )
    return {row.path: row.content for row in await tx.execute(query)}


def _replace(work: Path, path: str, text: str) -> None:
    """Write a memory, also where the agent made a directory, or a file in place of a directory."""
    try:
        trees.write(work, path, text.encode())
    except InvalidRequest:
        top = places.relative(places.MEMORY)
        parts = path.removeprefix(f"{top}/").split("/")
        for length in range(2, len(parts) + 1):
            trees.clear_way(work, f"{top}/{'/'.join(parts[:length])}", last=length == len(parts))
        trees.write(work, path, text.encode())


def _groups(items: list[str], size: int) -> Iterator[list[str]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]
