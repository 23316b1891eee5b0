"""How a process is contained: `none`, `restricted`, `bwrap`; limits; the probe of what this host can enforce."""

from __future__ import annotations

from claude_wrapper.sandbox.choose import choose, choose_level
from claude_wrapper.sandbox.port import (
    RANK,
    SOCKET_NAME,
    Containment,
    Launch,
    Layout,
    Level,
    Limits,
    Sandbox,
    SlotDirs,
)
from claude_wrapper.sandbox.probe import Finding, HostReport, probe
from claude_wrapper.sandbox.security import POLICIES, Egress, SecurityLevel, SecurityPolicy, effective_policy
from claude_wrapper.sandbox.staging import reachable_cli
from claude_wrapper.sandbox.uids import DEFAULT_RANGE, UidAllocator, UidRange

__all__ = [
    "DEFAULT_RANGE",
    "POLICIES",
    "RANK",
    "SOCKET_NAME",
    "Containment",
    "Egress",
    "Finding",
    "HostReport",
    "Launch",
    "Layout",
    "Level",
    "Limits",
    "Sandbox",
    "SecurityLevel",
    "SecurityPolicy",
    "SlotDirs",
    "UidAllocator",
    "UidRange",
    "choose",
    "choose_level",
    "effective_policy",
    "probe",
    "reachable_cli",
]
