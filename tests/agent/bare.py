"""A sandbox that contains nothing: what the agent room's tests start processes in."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path, PurePosixPath

from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.launch import LaunchProfile, LaunchSpec, command
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox.port import Containment, Launch, Layout, Level, SlotDirs

DOUBLES = Path(__file__).parent / "doubles"


class BareSandbox:
    """Runs the command line as it is. Kills the process group, which is what the agent promises to have made."""

    level = Level.NONE
    separate_uid = False

    def __init__(self) -> None:
        self.kills: list[int] = []

    def layout(self, dirs: SlotDirs, cli: Path) -> Layout:
        return Layout(PurePosixPath(dirs.home), PurePosixPath(dirs.work), None, PurePosixPath(cli))

    def create_dirs(self, root: Path, uid: int | None) -> SlotDirs:
        dirs = SlotDirs(root, root / "home", root / "work", root / "run")
        for path in (dirs.home, dirs.work, dirs.run):
            path.mkdir(mode=0o700, parents=True)
        return dirs

    def prepare(self, spec: Containment) -> Launch:
        return Launch((str(spec.cli), *spec.argv), dict(spec.env), spec.dirs.work)

    async def kill(self, pid: int, dirs: SlotDirs) -> None:
        self.kills.append(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def remove_dirs(self, dirs: SlotDirs) -> None:
        return

    def main_pid(self, spawned_pid: int) -> int:
        return spawned_pid

    def freeze(self, pid: int, dirs: SlotDirs) -> None:
        os.killpg(pid, signal.SIGSTOP)

    def thaw(self, pid: int, dirs: SlotDirs) -> None:
        os.killpg(pid, signal.SIGCONT)


def slot_dirs(root: Path) -> SlotDirs:
    return BareSandbox().create_dirs(root / "slot", None)


def cli_launch(
    cli: Path,
    dirs: SlotDirs,
    url: str,
    profile: LaunchProfile,
    *,
    session_uuid: str | None = None,
    resume_uuid: str | None = None,
    extra_env: Mapping[str, str] | None = None,
) -> Launch:
    """The real CLI, as the server would launch it."""
    spec = LaunchSpec(
        profile=profile,
        cli=cli,
        base_url=url,
        socket=None,
        token="sk-ant-dummy",
        home=PurePosixPath(dirs.home),
        work=PurePosixPath(dirs.work),
        session_uuid=session_uuid,
        resume_uuid=resume_uuid,
        model="claude-sonnet-5-5",
        extra_env=extra_env or {},
    )
    argv, env = command(spec)
    return Launch((str(cli), *argv), env, dirs.work)


@contextlib.asynccontextmanager
async def running(
    launch: Launch, dirs: SlotDirs, *, settings: AgentSettings | None = None, sandbox: BareSandbox | None = None
) -> AsyncIterator[Agent]:
    """An agent that is stopped at the end, whatever happened."""
    agent = await Agent.start(
        launch,
        sandbox=sandbox or BareSandbox(),
        dirs=dirs,
        clock=SystemClock(),
        ids=RandomIds(),
        settings=settings or AgentSettings(),
    )
    try:
        yield agent
    finally:
        await agent.stop(grace=0)
