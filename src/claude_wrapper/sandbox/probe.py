"""What this host can enforce: each mechanism tried for real, what is lost without it, and how to get it.

`probe` takes some tens of milliseconds, at most a few seconds, and leaves nothing behind. Run it once at start; the
report is frozen and serves the log, `claude-wrapper doctor` and `GET /v1/security`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import cgroup, commands, files, landlock, loopdisk
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.commands import Tools
from claude_wrapper.sandbox.port import RANK, Containment, Level, Limits, Sandbox
from claude_wrapper.sandbox.restricted import RestrictedHost, RestrictedSandbox
from claude_wrapper.sandbox.uids import DEFAULT_RANGE

_SECONDS = 5.0
_SMALL = Limits(
    memory_bytes=None,
    processes=64,
    cpu_share=None,
    file_bytes=1 << 20,
    open_files=256,
    tmp_bytes=1 << 20,
    shm_bytes=1 << 20,
    disk_bytes=None,
    disk_inodes=None,
    turn_seconds=_SECONDS,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One mechanism on this host."""

    name: str
    title: str
    present: bool
    detail: str
    """What was found, or why it is missing."""
    lost: str
    """What does not hold without it."""
    fix: str
    """How to get it."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """Everything that the probe found."""

    findings: tuple[Finding, ...]
    unavailable: dict[Level, str]
    """Levels that cannot be enforced here, with the reason."""
    tools: Tools
    hierarchies: tuple[cgroup.Hierarchy, ...]
    uids: bool
    disable_userns: bool
    landlock_abi: int

    @property
    def best(self) -> Level:
        """The strongest level that can be enforced."""
        return max((level for level in Level if level not in self.unavailable), key=RANK.__getitem__)

    def finding(self, name: str) -> Finding:
        """One mechanism by its name. Raises KeyError."""
        for found in self.findings:
            if found.name == name:
                return found
        raise KeyError(name)

    def to_wire(self) -> dict[str, Any]:
        """As JSON values for the API."""
        return {
            "best_level": self.best.value,
            "levels": [
                {
                    "level": level.value,
                    "available": level not in self.unavailable,
                    "reason": self.unavailable.get(level),
                }
                for level in sorted(Level, key=RANK.__getitem__, reverse=True)
            ],
            "mechanisms": [
                {"name": found.name, "title": found.title, "present": found.present, "detail": found.detail}
                | ({} if found.present else {"lost": found.lost, "fix": found.fix})
                for found in self.findings
            ],
        }

    def text(self) -> str:
        """For a terminal: one line each, with what is lost and the fix below what is missing."""
        lines = [f"sandbox: `{self.best}` is the strongest level that this host can enforce"]
        lines += [f"  {level} is not available: {reason}" for level, reason in self.unavailable.items()]
        for found in self.findings:
            lines.append(f"{'ok     ' if found.present else 'MISSING'} {found.title}: {found.detail}")
            if not found.present:
                lines += [f"          lost: {found.lost}", f"          fix:  {found.fix}"]
        return "\n".join(lines)


def probe(path: str = commands.SYSTEM_PATH) -> HostReport:
    """Try everything once. Never raises for what is missing."""
    tools = commands.find_tools(path)
    hierarchies = cgroup.hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    uids, why_no_uids = _try_uid(tools)
    abi = landlock.abi()
    uid = DEFAULT_RANGE.last if uids else None
    strict, why_not_strict = _try_bwrap(tools, uid=uid, disable_userns=True)
    works, why_not = (True, "") if strict else _try_bwrap(tools, uid=uid, disable_userns=False)
    if not works and uids:
        # Ordinary users may be kept from making namespaces where root is not.
        works, _ = _try_bwrap(tools, uid=None, disable_userns=False)
        if works:
            uids, why_no_uids = False, f"bubblewrap works as root only: {why_not}"
    restricted, why_not_restricted = _try_restricted(abi, uid)
    unavailable = ({} if works else {Level.BWRAP: why_not}) | (
        {} if restricted else {Level.RESTRICTED: why_not_restricted}
    )
    return HostReport(
        findings=(
            *(_bwrap(works, why_not, tools), _userns(strict, why_not_strict), _uids(uids, why_no_uids)),
            *(_landlock(abi), _filter(restricted, why_not_restricted), *_cgroups(list(hierarchies))),
            *(_openat2(), _disk(), _init(os.getpid())),
        ),
        unavailable=unavailable,
        tools=tools,
        hierarchies=tuple(hierarchies),
        uids=uids,
        disable_userns=strict,
        landlock_abi=abi,
    )


# Attempts ------------------------------------------------------------------------------------------------------------


def _run(argv: tuple[str, ...], **kw: Any) -> tuple[bool, str]:
    """Run to its end, bounded; returns whether it worked and its last words."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL, **kw)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    words = done.stderr.decode(errors="replace").strip().splitlines()
    return done.returncode == 0, words[-1] if words else f"exit status {done.returncode}"


def _try_uid(tools: Tools) -> tuple[bool, str]:
    if tools.setpriv is None:
        return False, "setpriv is not installed"
    return _run((*commands.become(tools.setpriv, DEFAULT_RANGE.last), "/bin/true"), env={})


def _attempt(sandbox: Sandbox, uid: int | None) -> tuple[bool, str]:
    """Start a shell that does nothing under this level, exactly as a slot would be started."""
    scratch = Path(tempfile.mkdtemp(prefix="claude-wrapper-probe-"))
    try:
        scratch.chmod(0o711)
        dirs = sandbox.create_dirs(scratch / "slot", uid)
        shell = Path("/bin/sh").resolve()
        spec = Containment(dirs=dirs, cli=shell, argv=("-c", "exit 0"), env={}, limits=_SMALL, uid=uid)
        launch = sandbox.prepare(spec)
        try:
            return _run(launch.argv, env=launch.env, cwd=launch.cwd, pass_fds=launch.pass_fds)
        finally:
            launch.close_fds()
    except (SandboxUnavailable, OSError) as error:
        return False, str(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _try_bwrap(tools: Tools, *, uid: int | None, disable_userns: bool) -> tuple[bool, str]:
    try:
        host = BwrapHost(tools=tools, cgroups=None, uids=uid is not None, disable_userns=disable_userns)
        return _attempt(BwrapSandbox(host), uid)
    except SandboxUnavailable as error:
        return False, error.message


def _try_restricted(abi: int, uid: int | None) -> tuple[bool, str]:
    try:
        host = RestrictedHost(landlock_abi=abi, cgroups=None, uids=uid is not None)
        return _attempt(RestrictedSandbox(host), uid)
    except SandboxUnavailable as error:
        return False, error.message


# Findings ------------------------------------------------------------------------------------------------------------

_NAMESPACE_FIX = (
    "Docker: `--security-opt seccomp=unconfined --security-opt systempaths=unconfined` (or a profile that also allows "
    "unshare, clone, mount, umount2 and pivot_root; no capability is needed). Kubernetes: `procMount: Unmasked` with "
    "`hostUsers: false` and such a seccomp profile. Ubuntu 24.04 hosts: an AppArmor profile with `userns,` for bwrap, "
    "or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
)


def _bwrap(works: bool, why: str, tools: Tools) -> Finding:
    fix = "apt-get install bubblewrap" if tools.bwrap is None else _NAMESPACE_FIX
    return Finding(
        *("bwrap", "namespaces through bubblewrap", works, "works" if works else why),
        "own file system view, process list and network: the level `bwrap`",
        fix,
    )


def _userns(works: bool, why: str) -> Finding:
    return Finding(
        *("disable_userns", "no user namespaces inside", works, "works" if works else why),
        "the second wall against new namespaces; the system-call filter still refuses them",
        "bubblewrap 0.8 or newer, and a writable /proc/sys inside the sandbox: " + _NAMESPACE_FIX,
    )


def _uids(works: bool, why: str) -> Finding:
    return Finding(
        *("uids", "an own uid for each slot", works, "works" if works else why),
        "processes run as the server's own user: a shell can write to its CLI's output pipe, process limits are shared, "
        "and a hole in another wall reaches the server's files",
        "run the server as root, or with CAP_SETUID, CAP_SETGID, CAP_CHOWN and CAP_DAC_OVERRIDE (Docker's default set has them): "
        "Kubernetes `runAsUser: 0` with `capabilities.add: [SETUID, SETGID, CHOWN, DAC_OVERRIDE]`, `allowPrivilegeEscalation: true`",
    )


def _landlock(abi: int) -> Finding:
    detail = f"ABI {abi}" if abi else "the kernel does not offer it"
    return Finding(
        *("landlock", "Landlock", abi > 0, detail),
        "in `restricted`, files are kept apart by uids only, and world-readable files of the host can be read",
        "Linux 5.13 or newer with `landlock` in CONFIG_LSM (boot option `lsm=landlock,…`); gVisor has none",
    )


def _filter(works: bool, why: str) -> Finding:
    return Finding(
        *("restricted", "system-call filter and restricted launcher", works, "works" if works else why),
        "the level `restricted`: unix sockets only, no other process's memory, no keyrings, bpf or io_uring",
        "a kernel with CONFIG_SECCOMP_FILTER, and Landlock or own uids",
    )


def _cgroups(hierarchies: list[cgroup.Hierarchy]) -> list[Finding]:
    tree = cgroup.open_tree(hierarchies, f"{os.getpid()}-probe")
    tree.close()
    missing = dict(tree.missing)
    fix = (
        "systemd: `Delegate=yes` in the service. Docker: `--cgroupns=private -v /sys/fs/cgroup:/sys/fs/cgroup:rw` for a "
        "root server; without it, limit the whole container with `--memory` and `--pids-limit`"
    )
    lost = {
        "memory": "one agent's memory is not limited: it can take all of the container's",
        "pids": "processes are counted per uid only; with a shared uid they are not limited in `restricted`",
        "cpu": "one agent can take all processors",
    }
    return [
        Finding(
            name=f"cgroup_{name}",
            title=f"control group: {name}",
            present=name not in missing,
            detail=missing.get(name, "writable"),
            lost=lost[name],
            fix=fix,
        )
        for name in ("memory", "pids", "cpu")
    ]


def _openat2() -> Finding:
    works = files.has_openat2()
    return Finding(
        *("openat2", "openat2 for the server's file access", works, "works" if works else "not offered"),
        "nothing: paths are walked component by component without following links, which is slower",
        "Linux 5.6 or newer and a container runtime that knows the call",
    )


def _disk() -> Finding:
    why = loopdisk.why_not()
    return Finding(
        *("loop_disk", "a disk limit that the kernel enforces", why is None, why or "loop devices work"),
        "home and workspace are measured every few seconds: between two looks an agent can write as fast as the disk takes",
        "run the server as root with CAP_SYS_ADMIN, loop devices and e2fsprogs, and set CLAUDE_WRAPPER_SANDBOX_DISK=loop; "
        "else put the data directory on a file system of its own: a full one then harms nothing else of the host",
    )


def _init(server_pid: int) -> Finding:
    return Finding(
        *("init", "an init process that reaps orphans", server_pid != 1, f"the server is process {server_pid}"),
        "orphans of agents in `restricted` and `none` stay as zombies and count against process limits",
        "Docker: `--init`. Kubernetes: `shareProcessNamespace: true`, or an image that starts with tini",
    )
