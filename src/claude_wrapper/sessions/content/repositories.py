"""Git repositories of a session, cloned by the server and moved into the workspace.

git runs outside of the sandbox, because the token must not be inside, but as the slot's user, in a directory that no
agent can reach while it runs: the agent could set configuration there that git would execute. Hooks, filters, submodules
and every protocol but the gateway's are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from claude_wrapper.broker.addresses import Network
from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, NotFound, WrapperError
from claude_wrapper.sandbox import commands, directories, disk
from claude_wrapper.sandbox.port import SlotDirs
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.acting import Acting
from claude_wrapper.sessions.content.gitgateway import Passage, Source, gateway
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.content.places import WorkDir

CLONE: Final = "repository_clone_error"
CHECKOUT: Final = "repository_checkout_error"
AUTHENTICATION: Final = "repository_authentication_error"
FORBIDDEN: Final = "repository_forbidden_error"
NOT_FOUND: Final = "repository_not_found_error"
TOKEN: Final = "repository_token"  # noqa: S105 - the kind of a secret
_BY_STATUS: Final[Mapping[int, str]] = {401: AUTHENTICATION, 403: FORBIDDEN, 404: NOT_FOUND, 410: NOT_FOUND}
_FULL: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?\Z")
_LOOK_SECONDS: Final = 0.5
_STDERR: Final = 4096


@dataclass(frozen=True, slots=True)
class CloneLimits:
    """Bounds of one repository. Sizes in bytes."""

    seconds: float = 300.0
    received: int = 1 << 30
    """What its server may send."""
    disk: int = 2 << 30
    """What it may take, with its working tree."""
    files: int = 500_000
    together: float = 600.0
    """Seconds for all repositories of one turn, which waits for them with its process."""


class RepositoryFailed(WrapperError):
    """A repository could not be brought into the workspace."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Cloning:
    """What repositories are cloned with."""

    scratch: Path
    """On the file system of the slots."""
    permitted: tuple[Network, ...] = ()
    limits: CloneLimits = CloneLimits()


@dataclass(frozen=True, slots=True)
class Told:
    """An error of one repository."""

    kind: str
    message: str
    url: str


async def put_repositories(
    acting: Acting, cloning: Cloning, wanted: Sequence[Mapping[str, Any]], workdir: WorkDir, manifest: Manifest
) -> list[Told]:
    """Clone what is not there yet. What is there is the agent's: it is not updated. What went wrong."""
    told: list[Told] = []
    clock, limits = acting.scribe.clock, cloning.limits
    until = clock.monotonic() + limits.together
    for one in wanted:
        if one["id"] in manifest.placed:
            continue
        path = places.relative(str(one["mount_path"]))
        left = until - clock.monotonic()
        if left <= 0:
            why = f"the repositories before it took {limits.together:g} s; the next turn tries again"
            told.append(Told(CLONE, f"{one['url']}: was not cloned: {why}", str(one["url"])))
            continue
        bounded = replace(cloning, limits=replace(limits, seconds=min(limits.seconds, left)))
        try:
            await _put(acting, bounded, one, workdir, path)
        except RepositoryFailed as error:
            told.append(Told(error.kind, f"{one['url']}: {error.message}", str(one["url"])))
        except WrapperError as error:
            told.append(Told(CLONE, f"{one['url']}: {error.message}", str(one["url"])))
        except OSError as error:
            told.append(Told(CLONE, f"{one['url']}: cannot be cloned: {error.strerror}", str(one["url"])))
        else:
            manifest.placed[one["id"]] = path
    return told


async def _put(acting: Acting, cloning: Cloning, wanted: Mapping[str, Any], workdir: WorkDir, path: str) -> None:
    git = shutil.which("git", path=commands.SYSTEM_PATH)
    if git is None:
        raise RepositoryFailed(CLONE, "git is not installed on this server: its operator can install it")
    if await asyncio.to_thread(_occupied, workdir.work, path):
        raise RepositoryFailed(CLONE, f"{wanted['mount_path']} is not empty")
    try:
        token = (await acting.means.secrets.get(acting.principal, TOKEN, str(wanted["id"])))["token"]
    except NotFound:
        token = None
    source = Source(str(wanted["url"]), token)
    root = cloning.scratch / acting.scribe.ids.new("clone")
    dirs = await asyncio.to_thread(directories.create, root, workdir.uid)
    try:
        async with (
            asyncio.timeout(cloning.limits.seconds),
            gateway(source, permitted=cloning.permitted, most=cloning.limits.received) as passage,
        ):
            run = _Git(git, dirs, workdir.uid, cloning.limits, acting.scribe.clock)
            await _clone(run, passage, source.url, wanted.get("checkout"))
        await asyncio.to_thread(trees.move_in, dirs.work / "tree", workdir.work, path)
    except TimeoutError:
        raise RepositoryFailed(CLONE, f"took longer than {cloning.limits.seconds:g} s") from None
    finally:
        await asyncio.to_thread(directories.remove, dirs)


def _occupied(work: Path, path: str) -> bool:
    return trees.exists(work, path) and (not path or any(True for _ in trees.entries(work, path, most=10)))


async def _clone(run: _Git, passage: Passage, url: str, checkout: Mapping[str, Any] | None) -> None:
    status, said = await run("clone", "--no-checkout", "--template=", "--", passage.url, "tree")
    if status != 0:
        raise _failed(passage, said)
    await _check_out(run, checkout)
    status, said = await run("-C", "tree", "remote", "set-url", "origin", url)
    if status != 0:
        raise RepositoryFailed(CLONE, said)


def _failed(passage: Passage, said: str) -> RepositoryFailed:
    if passage.problem is not None:
        return RepositoryFailed(CLONE, passage.problem)
    if passage.status is not None:
        what = _REASONS.get(passage.status, f"its server answered {passage.status}")
        return RepositoryFailed(_BY_STATUS.get(passage.status, CLONE), what)
    # git's words may quote the gateway's address, which nobody knows.
    return RepositoryFailed(CLONE, f"git could not clone it: {said.replace(passage.url, 'the repository')}")


_REASONS: Final[Mapping[int, str]] = {
    401: "its server wants a valid token: give one as authorization_token",
    403: "its server refuses this token",
    404: "there is no such repository, or this token does not show it",
}


async def _check_out(run: _Git, checkout: Mapping[str, Any] | None) -> None:
    if checkout is None:
        status, _ = await run("-C", "tree", "rev-parse", "--verify", "--quiet", "HEAD")
        if status != 0:
            return  # an empty repository
        what, arguments = "its default branch", ["HEAD"]
    elif checkout["type"] == "branch":
        name = str(checkout["name"])
        what, arguments = f"the branch {name!r}", ["-B", name, "--track", f"refs/remotes/origin/{name}"]
    else:
        sha = str(checkout["sha"])
        what, arguments = f"the commit {sha}", ["--detach", sha]
        if _FULL.match(sha) and (await run("-C", "tree", "cat-file", "-e", f"{sha}^{{commit}}"))[0] != 0:
            await run("-C", "tree", "fetch", "--quiet", "origin", sha)  # no branch leads to it
    if arguments == ["HEAD"]:
        status, said = await run("-C", "tree", "reset", "--quiet", "--hard", "HEAD")
    else:
        status, said = await run("-C", "tree", "checkout", "--quiet", "--force", *arguments)
    if status != 0:
        raise RepositoryFailed(CHECKOUT, f"{what} cannot be checked out: {said}")


_CONFIGURED: Final = (
    *("core.hooksPath=/dev/null", "protocol.allow=never", "protocol.http.allow=always", "http.followRedirects=false"),
    *("submodule.recurse=false", "fetch.recurseSubmodules=false", "credential.helper=", "core.fsmonitor=false"),
    *("gc.auto=0", "maintenance.auto=false", "core.logAllRefUpdates=false", "core.askPass=/bin/false"),
)


class _Git:
    """Runs git in a scratch directory, as the slot's user, and ends it when the directory outgrows its limits."""

    def __init__(self, git: str, dirs: SlotDirs, uid: int | None, limits: CloneLimits, clock: Clock) -> None:
        self._dirs = dirs
        self._limits = limits
        self._clock = clock
        tools = commands.find_tools(commands.SYSTEM_PATH)
        argv: tuple[str, ...] = ()
        if uid is not None:
            if tools.setpriv is None:
                raise RepositoryFailed(CLONE, "setpriv is not installed on this server: its operator can install it")
            argv = commands.become(tools.setpriv, uid)
        if tools.prlimit is not None:
            argv += (str(tools.prlimit), "--core=0", f"--fsize={limits.disk}", "--")
        self._argv = (*argv, git, *(part for one in _CONFIGURED for part in ("-c", one)))

    async def __call__(self, *arguments: str) -> tuple[int, str]:
        """(exit status, what it said about its failure)."""
        process = await asyncio.create_subprocess_exec(
            *self._argv,
            *arguments,
            cwd=self._dirs.work,
            env={
                "PATH": commands.SYSTEM_PATH,
                "HOME": str(self._dirs.home),
                "LANG": "C.UTF-8",
                "no_proxy": "*",
                "GIT_CONFIG_NOSYSTEM": "1",
                "GIT_CONFIG_GLOBAL": "/dev/null",
                "GIT_TERMINAL_PROMPT": "0",
                "GIT_LFS_SKIP_SMUDGE": "1",
                "GIT_ATTR_NOSYSTEM": "1",
                "GIT_PROTOCOL_FROM_USER": "0",
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        watching = asyncio.ensure_future(self._watch())
        reading = asyncio.ensure_future(_said(process))
        try:
            await asyncio.wait({watching, reading}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                raise RepositoryFailed(CLONE, watching.result())
            return await process.wait(), reading.result()
        finally:
            for task in (watching, reading):
                task.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _watch(self) -> str:
        """Return when a limit is exceeded, with the reason."""
        limits = self._limits
        while True:
            await self._clock.sleep(_LOOK_SECONDS)
            used = await asyncio.to_thread(disk.usage, self._dirs, stop_after=limits.files)
            if used.disk_bytes > limits.disk or used.inodes > limits.files:
                return f"it takes more than {limits.disk} bytes or {limits.files} files"


async def _said(process: asyncio.subprocess.Process) -> str:
    """The last line of stderr, which is read to its end."""
    kept = b""
    assert process.stderr is not None  # noqa: S101 - it was asked for
    while piece := await process.stderr.read(_STDERR):
        kept = (kept + piece)[-_STDERR:]
    lines = [line for line in kept.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "git said nothing"


def check_name(value: str, field: str) -> str:
    """The name of a branch, as git allows it and as no option. Raises InvalidRequest."""
    bad = value.startswith(("-", "/", ".")) or value.endswith(("/", ".", ".lock")) or "@{" in value or value == "@"
    bad = (
        bad
        or any(one in value for one in ("..", "//", "/.", ".lock/"))
        or bool(re.search(r"[\x00-\x20~^:?*\[\\\x7f]", value))
    )
    if bad:
        raise InvalidRequest("is not the name of a branch", field=field)
    return value
