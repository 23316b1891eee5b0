"""What agents may do, as one table: three security levels, and what is left of each without a strong sandbox.

The table is the truth: the server enforces it, `docs/security-levels.md` is generated from it (`markdown`), and a test
compares the two. Settings of the CLI itself (deny rules, its own sandbox) are no wall and are not counted as one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from claude_wrapper.errors import ConfigurationError, InvalidRequest
from claude_wrapper.sandbox.port import Level, Limits


class SecurityLevel(enum.StrEnum):
    """Strictest first."""

    STRICT = "strict"
    BALANCED = "balanced"
    PERMISSIVE = "permissive"


STRICTNESS: Mapping[SecurityLevel, int] = {
    SecurityLevel.PERMISSIVE: 0,
    SecurityLevel.BALANCED: 1,
    SecurityLevel.STRICT: 2,
}
"""How strict a level is: compare these, never the names."""


SETTING = "security_level"
"""The setting of an organisation that holds its choice."""


class Egress(enum.StrEnum):
    """What a process may reach over the network besides the model API through its broker."""

    NONE = "none"
    ALLOWLIST = "allowlist"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class SecurityPolicy:
    """What one level allows in one sandbox."""

    level: SecurityLevel
    tools: tuple[str, ...]
    """Built-in tools that a request may ask for."""
    permission_modes: tuple[str, ...]
    """The first is the default."""
    egress: Egress
    local_mcp: bool
    """Whether MCP servers may be local commands (stdio); remote ones go through the broker in any case."""
    limits: Limits
    lowered: tuple[str, ...] = ()
    """Why something that the level promises is not allowed or not enforced here; told to callers who ask for it."""


FILES = ("Read", "Write", "Edit", "NotebookEdit")
"""Work on files. In the CLI's default mode, what lies outside the workspace is asked for, and the server denies it."""
PLANNING = ("Task", "TaskStop", "ListAgents", "SendMessage", "Skill", "ToolSearch", "ReportFindings", "Workflow")
SHELL = ("Bash", "Monitor", "EnterWorktree", "ExitWorktree")
"""Tools that run commands."""
SEARCH = ("WebSearch",)
"""Runs at the model API, through the broker: no network of the process's own."""
FETCH = ("WebFetch",)
TIMERS = ("CronCreate", "CronDelete", "CronList", "ScheduleWakeup")
"""Start turns on their own; they end with the process."""

_MB, _GB = 1 << 20, 1 << 30

POLICIES: Mapping[SecurityLevel, SecurityPolicy] = {
    SecurityLevel.STRICT: SecurityPolicy(
        level=SecurityLevel.STRICT,
        tools=(*FILES, *PLANNING),
        permission_modes=("default", "plan", "acceptEdits"),
        egress=Egress.NONE,
        local_mcp=False,
        limits=Limits(
            memory_bytes=1 * _GB,
            processes=128,
            cpu_share=1.0,
            file_bytes=64 * _MB,
            open_files=4096,
            tmp_bytes=128 * _MB,
            shm_bytes=32 * _MB,
            disk_bytes=512 * _MB,
            disk_inodes=20_000,
            turn_seconds=300.0,
        ),
    ),
    SecurityLevel.BALANCED: SecurityPolicy(
        level=SecurityLevel.BALANCED,
        tools=(*FILES, *PLANNING, *SHELL, *SEARCH, *FETCH),
        permission_modes=("default", "plan", "acceptEdits", "bypassPermissions"),
        egress=Egress.ALLOWLIST,
        local_mcp=True,
        limits=Limits(
            memory_bytes=2 * _GB,
            processes=256,
            cpu_share=2.0,
            file_bytes=256 * _MB,
            open_files=8192,
            tmp_bytes=256 * _MB,
            shm_bytes=64 * _MB,
            disk_bytes=2 * _GB,
            disk_inodes=100_000,
            turn_seconds=900.0,
        ),
    ),
    SecurityLevel.PERMISSIVE: SecurityPolicy(
        level=SecurityLevel.PERMISSIVE,
        tools=(*FILES, *PLANNING, *SHELL, *SEARCH, *FETCH, *TIMERS),
        permission_modes=("default", "plan", "acceptEdits", "bypassPermissions"),
        egress=Egress.OPEN,
        local_mcp=True,
        limits=Limits(
            memory_bytes=4 * _GB,
            processes=1024,
            cpu_share=None,
            file_bytes=1 * _GB,
            open_files=8192,
            tmp_bytes=1 * _GB,
            shm_bytes=256 * _MB,
            disk_bytes=10 * _GB,
            disk_inodes=500_000,
            turn_seconds=3600.0,
        ),
    ),
}

_NO_SANDBOX = "there is no sandbox on this server"
_UNCONTAINED = (
    f"{_NO_SANDBOX}: agents run as the server's own user with its network and files, "
    "and no limit but the turn's time is enforced"
)


def effective_policy(level: SecurityLevel, sandbox: Level) -> SecurityPolicy:
    """What the level allows where this sandbox is in force; `lowered` says what it lost and why."""
    policy = POLICIES[level]
    if sandbox is Level.RESTRICTED:
        return _without_network(policy)
    if sandbox is Level.NONE:
        return _without_sandbox(policy)
    return policy


def _without_network(policy: SecurityPolicy) -> SecurityPolicy:
    """`restricted` leaves unix sockets only: nothing but the broker can be reached."""
    if policy.egress is Egress.NONE:
        return policy
    return replace(
        policy,
        egress=Egress.NONE,
        tools=tuple(name for name in policy.tools if name not in FETCH),
        lowered=("no network and no WebFetch: the sandbox `restricted` leaves only the broker's socket",),
    )


def _without_sandbox(policy: SecurityPolicy) -> SecurityPolicy:
    if policy.level is SecurityLevel.PERMISSIVE:
        return replace(
            policy,
            lowered=(_UNCONTAINED,),
        )
    if policy.level is SecurityLevel.STRICT:
        return replace(policy, tools=(), permission_modes=("default",), lowered=(f"no built-in tools: {_NO_SANDBOX}",))
    return replace(
        policy,
        tools=(*FILES, *PLANNING),
        permission_modes=tuple(mode for mode in policy.permission_modes if mode != "bypassPermissions"),
        egress=Egress.NONE,
        local_mcp=False,
        lowered=(
            f"no shell (Bash): {_NO_SANDBOX}",
            f"no network tools (WebFetch, WebSearch): {_NO_SANDBOX}",
            f"no local MCP commands: {_NO_SANDBOX}",
            f"permissions cannot be bypassed: {_NO_SANDBOX}",
        ),
    )


@dataclass(frozen=True, slots=True)
class SecurityLevels:
    """What the operator decided: the level of everybody, and how far an organisation's admin may loosen it."""

    sandbox: Level
    default: SecurityLevel
    loosest: SecurityLevel

    def __post_init__(self) -> None:
        """Raises ConfigurationError for a bound below the server's own level."""
        if STRICTNESS[self.loosest] > STRICTNESS[self.default]:
            raise ConfigurationError(
                f"CLAUDE_WRAPPER_SECURITY_LOOSEST: {self.loosest} is stricter than the server's own level {self.default}"
            )

    def level_of(self, asked: object) -> SecurityLevel:
        """The level in force for an organisation that asks for this one (None: it asks for none).

        One beyond the operator's bound becomes the bound; what is no level at all becomes the strictest one.
        """
        if asked is None:
            return self.default
        try:
            level = SecurityLevel(str(asked))
        except ValueError:
            return SecurityLevel.STRICT
        return level if STRICTNESS[level] >= STRICTNESS[self.loosest] else self.loosest

    def require(self, asked: str) -> SecurityLevel:
        """The level that an organisation's admin asks for. Raises InvalidRequest when the operator does not allow it."""
        allowed = ", ".join(self.allowed)
        if asked not in self.allowed:
            raise InvalidRequest(f"must be one of {allowed} (the operator's bound)", field=SETTING)
        return SecurityLevel(asked)

    def policy(self, level: SecurityLevel) -> SecurityPolicy:
        """What the level allows in this server's sandbox."""
        return effective_policy(level, self.sandbox)

    @property
    def allowed(self) -> tuple[SecurityLevel, ...]:
        """The levels that an organisation may choose, strictest first."""
        return tuple(level for level in SecurityLevel if STRICTNESS[level] >= STRICTNESS[self.loosest])


# The documentation -----------------------------------------------------------------------------------------------------

_SANDBOXES = (Level.BWRAP, Level.RESTRICTED, Level.NONE)


def markdown() -> str:
    """`docs/security-levels.md`."""
    lines = [
        "# Security levels",
        "",
        "<!-- Generated from claude_wrapper.sandbox.security by `make docs`: do not edit. -->",
        "",
        "`CLAUDE_WRAPPER_SECURITY_LEVEL` sets the server's level; `balanced` is the default. An organisation's admin may choose",
        "another by the organisation's setting `security_level` (`POST /v1/organizations/{id}`, or `claude-wrapper admin org",
        "security`): any stricter one, and a looser one as far as `CLAUDE_WRAPPER_SECURITY_LOOSEST` allows (by default not at",
        "all). A change is in force for turns that begin ten seconds later, on every replica; a process that was started for",
        "another level is not used. `GET /v1/security` tells the caller's own level, the choice, and the sandbox.",
        "",
        *_table("with a full sandbox (`bwrap`)", Level.BWRAP),
        "",
        "Memory and CPU need a writable control group; `claude-wrapper doctor` tells whether this host has one. The disk quota is",
        "measured every few seconds, and an agent beyond it is stopped; with `CLAUDE_WRAPPER_SANDBOX_DISK=loop` (root and loop",
        "devices) each agent has a disk of its own, and the kernel enforces it.",
        "",
        "## With a weaker sandbox",
        "",
    ]
    for sandbox in _SANDBOXES[1:]:
        lines += [f"### `{sandbox}`", ""]
        for level in SecurityLevel:
            policy = effective_policy(level, sandbox)
            lines += [f"* `{level}`: {'; '.join(policy.lowered) or 'the same as in the table'}."]
        lines.append("")
    return "\n".join(lines)


def _table(title: str, sandbox: Level) -> list[str]:
    policies = [effective_policy(level, sandbox) for level in SecurityLevel]
    rows: list[tuple[str, list[str]]] = [
        ("Built-in tools", [", ".join(policy.tools) for policy in policies]),
        ("Permission modes", [", ".join(policy.permission_modes) for policy in policies]),
        ("Network egress", [policy.egress.value for policy in policies]),
        ("Local MCP commands", ["yes" if policy.local_mcp else "no" for policy in policies]),
        ("Memory", [_size(policy.limits.memory_bytes) for policy in policies]),
        ("Processes and threads", [str(policy.limits.processes) for policy in policies]),
        ("Processor cores", [_number(policy.limits.cpu_share) for policy in policies]),
        ("Largest file", [_size(policy.limits.file_bytes) for policy in policies]),
        ("Open files", [str(policy.limits.open_files) for policy in policies]),
        (
            "Private /tmp and /dev/shm",
            [f"{_size(one.limits.tmp_bytes)}, {_size(one.limits.shm_bytes)}" for one in policies],
        ),
        ("Disk", [f"{_size(one.limits.disk_bytes)}, {one.limits.disk_inodes} files" for one in policies]),
        ("Time per turn", [f"{policy.limits.turn_seconds:g} s" for policy in policies]),
    ]
    head = [title, *(f"`{level}`" for level in SecurityLevel)]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join([name, *cells]) + " |" for name, cells in rows),
    ]


def _size(size: int | None) -> str:
    if size is None:
        return "not limited"
    return f"{size // _GB} GiB" if size % _GB == 0 else f"{size // _MB} MiB"


def _number(value: float | None) -> str:
    return "not limited" if value is None else f"{value:g}"
