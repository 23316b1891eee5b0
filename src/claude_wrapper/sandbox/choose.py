"""From a setting and a host report to the sandbox that will be used, or to the reason why not."""

from __future__ import annotations

import os

from claude_wrapper.errors import ConfigurationError, SandboxUnavailable
from claude_wrapper.sandbox import cgroup
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.none import NoSandbox
from claude_wrapper.sandbox.port import RANK, Level, Sandbox
from claude_wrapper.sandbox.probe import HostReport
from claude_wrapper.sandbox.restricted import RestrictedHost, RestrictedSandbox

AUTO = "auto"


def choose_level(setting: str, required: Level | None, report: HostReport) -> Level:
    """The level to use. `auto` takes the strongest; a named one is taken or refused, never weakened.

    Raises SandboxUnavailable with the reason, ConfigurationError for an unknown name.
    """
    if setting == AUTO:
        level = report.best
    else:
        try:
            level = Level(setting)
        except ValueError:
            names = ", ".join([AUTO, *Level])
            raise ConfigurationError(f"sandbox: {setting!r} is not one of {names}") from None
        if level in report.unavailable:
            raise SandboxUnavailable(
                f"the sandbox `{level}` was asked for and this host cannot enforce it: {report.unavailable[level]}. "
                "`claude-wrapper doctor` says how to get it"
            )
    if required is not None and RANK[level] < RANK[required]:
        reason = report.unavailable.get(required, f"the setting names `{level}`")
        raise SandboxUnavailable(
            f"at least the sandbox `{required}` is required, and `{level}` is what there would be: {reason}. "
            "`claude-wrapper doctor` says how to get it"
        )
    return level


def choose(
    setting: str, required: Level | None, report: HostReport, *, unix_socket: bool = False, use_uids: bool = True
) -> Sandbox:
    """The sandbox, ready to use. Makes this server's control groups and clears away what dead servers left.

    `unix_socket`: with the level `none`, reach the broker by its socket. `use_uids`: False keeps the server's uid even
    where own ones are possible. Raises SandboxUnavailable, ConfigurationError.
    """
    level = choose_level(setting, required, report)
    if level is Level.NONE:
        return NoSandbox(unix_socket=unix_socket)
    hierarchies = list(report.hierarchies)
    cgroup.sweep(hierarchies)
    tree = cgroup.open_tree(hierarchies, str(os.getpid()))
    cgroups = tree if tree.parents else None
    uids = report.uids and use_uids
    if level is Level.RESTRICTED:
        return RestrictedSandbox(RestrictedHost(report.landlock_abi, cgroups, uids))
    return BwrapSandbox(BwrapHost(report.tools, cgroups, uids, report.disable_userns))
