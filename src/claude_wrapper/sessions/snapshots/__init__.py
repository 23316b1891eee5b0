"""Snapshots of a session's transcript and workspace, so that it outlives its process, its server and its machine."""

from __future__ import annotations

from claude_wrapper.sessions.snapshots.store import SnapshotStore
from claude_wrapper.sessions.snapshots.values import (
    Collected,
    Guard,
    Position,
    Progress,
    Restored,
    Snapshot,
    SnapshotSettings,
)

__all__ = ["Collected", "Guard", "Position", "Progress", "Restored", "Snapshot", "SnapshotSettings", "SnapshotStore"]
