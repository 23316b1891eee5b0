"""Brings a session's things into the workspace of its process before a turn, and out of it after one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import structlog

from claude_wrapper.errors import InvalidRequest, NotFound, SandboxUnavailable, WrapperError
from claude_wrapper.sessions import mounts
from claude_wrapper.sessions.content import manifest as notes
from claude_wrapper.sessions.content import outputs, places, prompt, trees
from claude_wrapper.sessions.content.acting import SCOPES, Acting
from claude_wrapper.sessions.content.files import put_files
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.content.memorysync import MemorySync, Mounted
from claude_wrapper.sessions.content.network import Hosts, hosts_of
from claude_wrapper.sessions.content.packages import ENVIRONMENT as INSTALLING
from claude_wrapper.sessions.content.packages import INSTALL_SECONDS, Step, failure, stamp, steps, wanted
from claude_wrapper.sessions.content.places import WorkDir
from claude_wrapper.sessions.content.repositories import Cloning, put_repositories
from claude_wrapper.sessions.content.skills import Shown, put_skills
from claude_wrapper.sessions.journal import Books
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import error_event

log = structlog.get_logger(__name__)

FILE_ERROR: Final = "file_mount_error"
SKILL_ERROR: Final = "skill_mount_error"
MEMORY_ERROR: Final = "memory_sync_error"
PACKAGE_ERROR: Final = "package_install_error"
OUTPUT_ERROR: Final = "output_error"
_LEAVE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a `session.error` says."""

    kind: str
    message: str
    more: Mapping[str, Any] = field(default_factory=dict)


class SessionContent:
    """One session's things. Its conversation calls `enter` before a turn and `leave` after it."""

    def __init__(
        self,
        books: Books,
        means: ResourceMeans,
        cloning: Cloning,
        principal: Principal,
        session: Callable[[], Session],
    ) -> None:
        """`principal` is the session's own; `session` gives it as it is now."""
        self._books = books
        self._cloning = cloning
        self._session = session
        self._acting = Acting(means, replace(principal, scopes=SCOPES), Scribe(books.clock, books.ids), session().id)
        self._memory = MemorySync(self._acting)
        self._stores: list[dict[str, Any]] = []
        """Mounted by the turn that runs."""
        self._refused = False
        self._prompt = ""
        self._news = ""

    @property
    def prompt(self) -> str:
        """What a fresh process is told in its system prompt; as of the last `enter`."""
        return self._prompt

    @property
    def news(self) -> str:
        """What a process that was told before is told with its next message."""
        return self._news

    @property
    def hosts(self) -> Hosts | None:
        """What the session's environment leaves of the network; None: it does not narrow."""
        return hosts_of(self._session().environment)

    async def enter(self, workdir: WorkDir | None) -> None:
        """Put everything in its place. What cannot be is told as `session.error`; the turn goes on.

        `workdir` is None when the agent has no tools that could see it.
        """
        self._prompt = self._news = ""
        self._stores = []
        session = self._session()
        if (session.environment or {}).get("type") == "self_hosted":
            return  # the customer's worker brings things to where the tools run
        resources = await self._resources()
        skills_wanted = list(session.agent.get("skills") or ())
        if workdir is None:
            await self._refuse(resources, skills_wanted)
            return
        work = workdir.work
        manifest = await asyncio.to_thread(notes.load, work)
        before = notes.copied(manifest)
        errors: list[Trouble] = []
        await self._take_away(work, manifest, resources, errors)
        of_kind: Mapping[str, list[dict[str, Any]]] = {
            kind: [one for one in resources if one["type"] == kind]
            for kind in ("file", "memory_store", "github_repository")
        }
        # Before the files: one of those may lie in a repository.
        repositories = of_kind["github_repository"]
        failed = await put_repositories(self._acting, self._cloning, repositories, workdir, manifest)
        placed, told = await put_files(self._acting, of_kind["file"], work, manifest)
        errors += [Trouble(FILE_ERROR, one) for one in told]
        skills: list[Shown] = []
        if skills_wanted or manifest.skills:
            skills, told = await put_skills(self._acting, skills_wanted, work, manifest)
            errors += [Trouble(SKILL_ERROR, one) for one in told]
        self._stores = of_kind["memory_store"]
        errors += await self._sync(work, manifest, self._stores)
        errors += [Trouble(one.kind, one.message, {"repository_url": one.url}) for one in failed]
        errors += await _noted(work, manifest, before)
        there = [one for one in resources if one["type"] == "memory_store" or one["id"] in manifest.placed]
        self._prompt = prompt.describe(
            workdir.seen, resources=there, skills=skills, packages=bool(wanted(session.environment))
        )
        self._news = prompt.announcement(workdir.seen, placed) if placed else ""
        await self.tell(errors)

    async def settle(self, workdir: WorkDir | None) -> None:
        """Install the environment's packages, once for a workspace. What cannot be is told; the turn goes on."""
        packages = wanted(self._session().environment)
        if workdir is None or not packages:
            return
        manifest = await asyncio.to_thread(notes.load, workdir.work)
        if manifest.packages == stamp(packages):
            return
        todo, refused = steps(packages)
        failed = [one for step in todo if (one := await self._installed(workdir, step)) is not None]
        # Not tried again and again: each try may take minutes.
        before, manifest.packages = notes.copied(manifest), stamp(packages)
        errors = [Trouble(PACKAGE_ERROR, one) for one in (*refused, *failed)]
        await self.tell(errors + await _noted(workdir.work, manifest, before))

    async def _installed(self, workdir: WorkDir, step: Step) -> str | None:
        """None, or why not."""
        if workdir.run is None:
            return f"{step.manager}: packages cannot be installed here"
        try:
            ran = await workdir.run(step.script, INSTALLING, INSTALL_SECONDS)
        except TimeoutError:
            return f"{step.manager} took longer than {INSTALL_SECONDS:g} s and was ended"
        except SandboxUnavailable as error:
            return f"{step.manager}: packages cannot be installed: {error.message}"
        return None if ran.status == 0 else failure(step, ran.status, ran.said)

    async def leave(self, workdir: WorkDir | None) -> None:
        """Keep what the turn changed: memory, outputs. Never raises: what fails is told to the session and logged."""
        if workdir is None:
            return
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self.tell(await self._keep(workdir.work))
        except (WrapperError, OSError) as error:  # a timeout is an OSError
            log.exception("content.not_kept", session=self._acting.session)
            reason = error.message if isinstance(error, WrapperError) else type(error).__name__
            with contextlib.suppress(WrapperError):
                await self.tell([Trouble(OUTPUT_ERROR, f"What the turn changed could not be kept: {reason}")])

    async def _keep(self, work: Path) -> list[Trouble]:
        manifest = await asyncio.to_thread(notes.load, work)
        before = notes.copied(manifest)
        errors = await self._sync(work, manifest, self._stores)
        kept = await outputs.collect(self._acting, work, manifest)
        errors += [Trouble(OUTPUT_ERROR, one) for one in kept]
        return errors + await _noted(work, manifest, before)

    # inside -----------------------------------------------------------------------------------------------------------

    async def _resources(self) -> list[dict[str, Any]]:
        async with self._books.db.read() as tx:
            return await mounts.all_of(tx, self._acting.principal, self._acting.session)

    async def _refuse(self, resources: Sequence[Mapping[str, Any]], skills: Sequence[Any]) -> None:
        if self._refused or not (resources or skills):
            return
        self._refused = True
        message = (
            f"The agent has no built-in tools, so that it cannot see what this session was given ({len(resources)} "
            f"resources, {len(skills)} skills): enable at least `read` in its toolset."
        )
        await self.tell([Trouble(FILE_ERROR, message)])

    async def _take_away(
        self, work: Path, manifest: Manifest, resources: Sequence[Mapping[str, Any]], errors: list[Trouble]
    ) -> None:
        """Remove what was placed for a resource that is gone."""
        known = {one["id"] for one in resources}
        for resource in [one for one in manifest.placed if one not in known]:
            try:
                await asyncio.to_thread(trees.remove, work, manifest.placed.pop(resource))
            except InvalidRequest as error:
                errors.append(Trouble(FILE_ERROR, error.message))

    async def _sync(self, work: Path, manifest: Manifest, stores: Sequence[Mapping[str, Any]]) -> list[Trouble]:
        errors: list[Trouble] = []
        for one in stores:
            store_id = str(one["memory_store_id"])
            slug = str(one["mount_path"]).removeprefix(f"{places.MEMORY}/")
            mounted = Mounted(store_id, slug, read_only=one.get("access") == "read_only")
            try:
                agreed, told = await self._memory.sync(work, mounted, manifest.memory.get(store_id, {}))
                manifest.memory[store_id] = agreed
            except WrapperError as error:
                told = [error.message]
            errors += [Trouble(MEMORY_ERROR, f"{one['mount_path']}: {message}") for message in told]
        return errors

    async def tell(self, errors: Sequence[Trouble]) -> None:
        """Write `session.error` events."""
        if not errors:
            return
        books, principal, session = self._books, self._acting.principal, self._acting.session
        events = [
            {"type": "session.error", "error": dict(error_event(one.kind, one.message, **one.more))} for one in errors
        ]
        try:
            stored = await books.db.run(lambda tx: books.log.write(tx, principal, session, events))
        except NotFound:
            return
        await books.log.publish(session, stored)


async def _noted(work: Path, manifest: Manifest, before: Manifest) -> list[Trouble]:
    """Write the note down if it is another than `before`. An agent that keeps the server from it does not end its turns."""
    if manifest == before:
        return []
    try:
        await asyncio.to_thread(notes.save, work, manifest)
    except InvalidRequest as error:
        return [Trouble(FILE_ERROR, f"what is in the workspace cannot be noted there: {error.message}")]
    return []
