"""How a process is contained: `none`, `restricted`, `bwrap`; limits; the probe of what this host can enforce."""

from __future__ import annotations

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

__all__ = ["RANK", "SOCKET_NAME", "Containment", "Launch", "Layout", "Level", "Limits", "Sandbox", "SlotDirs"]
