"""One slot's process with everything around it: sandbox, directories, broker endpoint and agent.

`ProcessFactory` is what the pool asks for a running process; `SlotProcess` is what it gets. A process of a *primed*
profile (chat with an API key) has answered a throw-away turn that the broker answered itself, and was rewound, so that
the CLI's lazy start-up is paid before a tenant arrives. Its system prompt is a placeholder that the broker replaces.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import structlog

from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.launch import Auth, LaunchProfile, LaunchSpec, command, transcript_path
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.broker.bodies import SYSTEM_PLACEHOLDER
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.egress import Egress
from claude_wrapper.broker.egresslists import EgressLists
from claude_wrapper.broker.endpoint import Endpoint
from claude_wrapper.broker.hosts import HostRule
from claude_wrapper.clock import Clock
from claude_wrapper.errors import SandboxUnavailable, SpawnFailed, WrapperError
from claude_wrapper.ids import Ids
from claude_wrapper.sandbox import loopdisk
from claude_wrapper.sandbox.files import empty_tree
from claude_wrapper.sandbox.port import SOCKET_NAME, Containment, Level, Limits, Sandbox, SlotDirs
from claude_wrapper.sandbox.staging import reachable_cli
from claude_wrapper.sandbox.uids import UidAllocator
from claude_wrapper.sessions import slotfiles
from claude_wrapper.sessions.canary import CANARY
from claude_wrapper.sessions.clitranscripts import put_transcript, remove_transcript
from claude_wrapper.sessions.content import places
from claude_wrapper.sessions.content.beside import Ran, run_beside
from claude_wrapper.sessions.diskguard import guard_disk

log = structlog.get_logger(__name__)

_PAGE: Final = 4096
_PROXY_PORT: Final = 3128
_KEPT_SECONDS: Final = 20.0
"""How long a new process waits for the old one of its conversation to end."""
_STOP_SECONDS: Final = 5.0
"""EOF on stdin ends a healthy CLI in 25 ms (measured); longer means it is stuck."""


@dataclass(frozen=True, slots=True)
class Resume:
    """An agent conversation whose process is gone and whose files were kept."""

    uuid: str
    """The CLI's session id: its transcript lies in the kept home. Empty: only the files are wanted."""
    kept: Path
    """Directory with `home/` and `work/` to move into the new slot."""
    ready: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    """Set while the files are there: the old process has ended, and no new one has them."""


@dataclass(slots=True)
class SlotProcess:
    """A running CLI in its slot. The pool sees the `Process` port; conversations use the agent and the endpoint."""

    slot: str
    profile: LaunchProfile
    agent: Agent
    endpoint: Endpoint
    sandbox: Sandbox
    dirs: SlotDirs
    uid: int | None
    release_uid: Callable[[int], None]
    primed: bool
    initialized: bool
    model: str
    workdir: places.WorkDir | None = None
    """Its workspace, if its agent has tools that can see it."""
    confined_to: PurePosixPath | None = None
    """Without a sandbox: the workspace, which file tools may not leave."""
    fingerprint: str | None = None
    permission_mode: str = "default"
    adopted: Resume | None = None
    """What it was started with, or was given as a spare."""
    resumes: bool = False
    """It was started with --resume: it holds its conversation's past."""
    claimed: bool = False
    """A conversation has it, and sees to its files."""
    half_told: bool = False
    """It was told a past, and has not answered yet: its transcript may lack the end of that."""
    kept: Resume | None = None
    """What will be left of it for the conversation to go on with."""
    mcp_servers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked_tools: frozenset[str] = frozenset()
    watching: asyncio.Task[None] | None = None
    open_network: Callable[[str, int], Awaitable[Egress | None]] | None = None
    """Opens a way to the network for a process of the slot: (name of the way, pid); None: it has none."""
    spec: Containment | None = None
    """How it is contained; None for a process without tools."""
    egress_lists: EgressLists | None = None
    egress: Egress | None = None
    guarding: asyncio.Task[None] | None = None
    """Looks after the size of the workspace of a process with tools."""

    async def reach(self, org: str, within: tuple[HostRule, ...] | None = None) -> None:
        """Let the process reach what this organisation may reach, of that only `within` if that is given, and nothing else. After it has been initialised."""
        if self.open_network is None or self.egress_lists is None:
            return
        if self.egress is None:
            self.egress = await self.open_network(self.slot, self.agent.pid)
        rules = replace(await self.egress_lists.rules(org), within=within)
        if self.egress is not None and self.egress.rules != rules:
            self.egress.allow(rules)

    async def run_beside(self, script: str, env: Mapping[str, str], seconds: float) -> Ran:
        """Run a script in a sandbox like the agent's, which reaches what the agent reaches (after `reach`).

        Raises SandboxUnavailable, TimeoutError.
        """
        if self.spec is None or self.sandbox.level is Level.RESTRICTED:
            raise SandboxUnavailable(f"the sandbox level {self.sandbox.level} gives commands no network")
        ways = None if self.egress is None else self._open_beside
        return await run_beside(self.sandbox, self.spec, script, env=env, open_network=ways, seconds=seconds)

    async def _open_beside(self, pid: int) -> Egress | None:
        opened = await self.open_network(f"{self.slot}-beside", pid) if self.open_network is not None else None
        if opened is not None and self.egress is not None:
            opened.allow(self.egress.rules)
        return opened

    @property
    def pid(self) -> int:
        return self.agent.main_pid

    @property
    def alive(self) -> bool:
        return self.agent.alive

    def freeze(self) -> None:
        self.agent.freeze()

    def thaw(self) -> None:
        self.agent.thaw()

    def memory_bytes(self) -> int | None:
        """Resident bytes of the CLI; None when it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb", buffering=0) as statm:  # noqa: PTH123 (asked after every turn)
                fields = statm.read(100).split()
        except (OSError, ValueError):
            return None
        return int(fields[1]) * _PAGE

    def on_exit(self, callback: Callable[[], None]) -> None:
        async def tell() -> None:
            await self.agent.closed.wait()
            callback()

        self.watching = asyncio.get_running_loop().create_task(tell(), name=f"exit-{self.slot}")

    async def rewind(self) -> bool:
        """Forget the conversation. False when this process cannot be made clean: only the primed chat profile can."""
        if not (self.primed and self.alive):
            return False
        self.endpoint.unbind()
        try:
            await self.agent.rewind()
            if self.mcp_servers:
                await self.agent.mcp_set_servers({})
        except WrapperError:
            return False
        self.fingerprint = None
        self.mcp_servers = {}
        await asyncio.to_thread(empty_tree, self.dirs.work)
        return True

    async def adopt(self, resume: Resume) -> None:
        """Give a spare the files of a conversation. Raises SpawnFailed; the files are then where they were kept."""
        if not resume.ready.is_set():
            raise SpawnFailed("the files of the session are with another process that is being started or ended")
        resume.ready.clear()
        self.adopted = resume
        moving = asyncio.ensure_future(asyncio.to_thread(slotfiles.move_into, resume.kept, self.dirs, self.uid))
        try:
            await asyncio.wait({moving})
        finally:
            if not moving.done():  # cancelled: a thread cannot be stopped, and whoever keeps the files must find them
                await asyncio.wait({moving})
            if error := moving.exception():
                self.adopted = None
                resume.ready.set()
        if error is not None:
            raise SpawnFailed(f"the files of the session cannot be moved to its process: {error}") from error

    async def told(self) -> None:
        """It has answered: its own transcript holds the past that it was told, and the one before is not needed."""
        self.half_told = False
        if self.adopted is not None and self.adopted.uuid:
            await asyncio.to_thread(remove_transcript, self.dirs.home, self.adopted.uuid)

    def keep(self, target: Path) -> Resume | None:
        """Let `stop` move home and workspace to `target` instead of removing them. None when there is nothing to
        resume: the CLI has not begun a session, and nothing was there before."""
        before = self.adopted.uuid if self.adopted is not None else None
        uuid = self.agent.session_uuid or before
        if uuid is None:
            return None
        if self.half_told:
            uuid = before or ""
        if self.kept is None:
            self.kept = Resume(uuid, target)
        return self.kept

    async def stop(self, reason: str) -> None:
        """End the process and everything that belongs to its slot. May be called again when it failed half-way."""
        del reason
        if self.guarding is not None:
            self.guarding.cancel()
        await self.agent.stop(grace=_STOP_SECONDS)  # the CLI writes its transcript out when its input ends
        await self.endpoint.close()
        if self.egress is not None:
            await self.egress.close()
        if self.kept is not None and not self.kept.ready.is_set():
            await asyncio.to_thread(slotfiles.keep, self.dirs, self.kept.kept)
            self.kept.ready.set()
        elif self.adopted is not None and not self.claimed:
            await asyncio.to_thread(slotfiles.keep, self.dirs, self.adopted.kept)  # who asked for it has gone
            self.adopted.ready.set()
        await asyncio.to_thread(slotfiles.remove, self.sandbox, self.dirs)
        uid, self.uid = self.uid, None
        if uid is not None:
            self.release_uid(uid)


class ProcessFactory:
    """Starts processes for the pool: directories, endpoint, sandbox, CLI, initialisation, priming."""

    def __init__(
        self,
        *,
        cli: Path,
        canary: Path | None = None,
        slots_dir: Path,
        sandbox: Sandbox,
        limits: Limits,
        broker: Broker,
        settings: AgentSettings,
        default_model: str,
        clock: Clock,
        ids: Ids,
        uids: UidAllocator | None,
        extra_env: Mapping[str, str] | None = None,
        egress: EgressLists | None = None,
        limits_by_level: Mapping[str, Limits] | None = None,
        loop_disks: bool = False,
    ) -> None:
        """`limits` are the server's own, `limits_by_level` those of profiles that name a security level; `loop_disks`
        gives each process with tools a disk of its own, else its use of the disk is measured."""
        self.cli, self._canary = cli, canary
        self._slots_dir = slots_dir
        self._sandbox = sandbox
        self._limits = limits
        self._limits_by_level = limits_by_level or {}
        self._loop_disks = loop_disks
        self._broker = broker
        self._settings = settings
        self._default_model = default_model
        self._clock = clock
        self._ids = ids
        self._uids = uids
        self._extra_env = dict(extra_env or {})
        self._egress = egress if sandbox.level is Level.BWRAP else None

    async def spawn(self, slot: str, profile: LaunchProfile, resume: Resume | None) -> SlotProcess:
        """A running process, initialised and primed when its profile allows it. Raises SpawnFailed."""
        cleanup = contextlib.AsyncExitStack()
        async with cleanup:
            try:
                process = await self._spawn(slot, profile, resume, cleanup)
            except (WrapperError, OSError, TimeoutError) as error:
                if isinstance(error, SpawnFailed):
                    raise
                raise SpawnFailed(f"The Claude process could not be started: {error}") from error
            cleanup.pop_all()
            return process

    async def _spawn(
        self, slot: str, profile: LaunchProfile, resume: Resume | None, cleanup: contextlib.AsyncExitStack
    ) -> SlotProcess:
        uid = self._uids.acquire() if self._uids is not None else None
        release_uid: Callable[[int], None] = self._uids.release if self._uids is not None else (lambda _uid: None)
        if uid is not None:
            cleanup.callback(release_uid, uid)
        dirs = self._sandbox.create_dirs(self._slots_dir / slot, uid)
        cleanup.push_async_callback(asyncio.to_thread, slotfiles.remove, self._sandbox, dirs)
        limits = self._limits_by_level.get(profile.security, self._limits)
        own_disk = self._loop_disks and profile.tools != ()
        if own_disk:
            await asyncio.to_thread(loopdisk.create, dirs, limits, uid)
        if resume is not None:
            async with asyncio.timeout(_KEPT_SECONDS):
                await resume.ready.wait()
            resume.ready.clear()
            # When the process does not start, its conversation's files are kept for the next one.
            cleanup.callback(resume.ready.set)
            cleanup.push_async_callback(asyncio.to_thread, slotfiles.keep, dirs, resume.kept)
            await asyncio.to_thread(slotfiles.adopt, resume.kept, dirs, uid)
        cli = await self._reachable_cli(profile, uid)
        layout = self._sandbox.layout(dirs, cli)
        if resume is not None and resume.uuid:
            there = transcript_path(dirs.home, layout.work, resume.uuid)
            if not await asyncio.to_thread(put_transcript, dirs.home, resume.uuid, there):
                raise SpawnFailed(f"The transcript of the conversation ({resume.uuid}) is not in its home any more")
        endpoint = await self._broker.open(slot, dirs.run / SOCKET_NAME if layout.socket is not None else None)
        cleanup.push_async_callback(endpoint.close)
        networked = self._egress is not None and profile.tools != ()
        argv, env = command(
            LaunchSpec(
                profile=profile,
                cli=cli,
                base_url=endpoint.base_url,
                socket=layout.socket,
                token=endpoint.token,
                home=layout.home,
                work=layout.work,
                session_uuid=None if resume and resume.uuid else self._ids.uuid(),
                resume_uuid=(resume.uuid or None) if resume else None,
                model=self._default_model,
                extra_env=self._extra_env,
                proxy=f"http://127.0.0.1:{_PROXY_PORT}" if networked else None,
            )
        )
        spec = Containment(dirs=dirs, cli=cli, argv=argv, env=env, limits=limits, uid=uid)
        workdir = None
        if profile.tools != ():
            await asyncio.to_thread(places.make_mount_root, dirs.work, uid)
            workdir = places.WorkDir(dirs.work, uid, places.Seen(layout.work, bound=layout.binds))
            if layout.binds:
                binds, masked = places.binds(dirs.work, layout.work)
                spec = replace(spec, binds=binds, masked=masked)
        launch = self._sandbox.prepare(spec)
        agent = await Agent.start(
            launch, sandbox=self._sandbox, dirs=dirs, clock=self._clock, ids=self._ids, settings=self._settings
        )
        cleanup.push_async_callback(agent.stop, grace=_STOP_SECONDS)
        primed = profile.bare and profile.tools == () and profile.auth is Auth.API_KEY and resume is None
        if primed:
            await agent.initialize(system_prompt=[SYSTEM_PLACEHOLDER])
            with endpoint.prime():
                await agent.prime(self._ids.uuid())
        guarding = None
        if profile.tools != () and not own_disk:
            watch = guard_disk(slot, dirs, limits, self._clock, agent.condemn)
            guarding = asyncio.get_running_loop().create_task(watch, name=f"disk-{slot}")
        process = SlotProcess(
            slot=slot,
            profile=profile,
            agent=agent,
            endpoint=endpoint,
            sandbox=self._sandbox,
            dirs=dirs,
            uid=uid,
            release_uid=release_uid,
            primed=primed,
            initialized=primed,
            model=self._default_model,
            workdir=workdir,
            confined_to=layout.work if self._sandbox.level is Level.NONE else None,
            open_network=partial(self._open_network, uid) if networked else None,
            egress_lists=self._egress,
            guarding=guarding,
            spec=None if workdir is None else spec,
            adopted=resume,
            resumes=resume is not None and bool(resume.uuid),
        )
        if workdir is not None:
            process.workdir = replace(workdir, run=process.run_beside)
        return process

    async def _reachable_cli(self, profile: LaunchProfile, uid: int | None) -> Path:
        """The profile's CLI, where this uid can reach it. Two CLIs may have the same file name."""
        cli, staged = self.cli, self._slots_dir.parent / "cli"
        if profile.cli == CANARY and self._canary is not None:
            cli, staged = self._canary, staged / CANARY
        return await asyncio.to_thread(reachable_cli, cli, staged, uid)

    async def _open_network(self, uid: int | None, name: str, pid: int) -> Egress | None:
        """A proxy on the loopback of the process's own network."""
        try:
            listener = await asyncio.to_thread(self._sandbox.listen_inside, pid, _PROXY_PORT, uid)
        except SandboxUnavailable as error:
            log.warning("egress.unavailable", slot=name, reason=error.message)
            return None
        return await self._broker.open_egress(name, listener)


def leftover_slots(slots_dir: Path) -> Iterable[Path]:
    """Directories of slots whose server died without cleaning up; their processes died with it."""
    return sorted(slots_dir.iterdir()) if slots_dir.exists() else ()
