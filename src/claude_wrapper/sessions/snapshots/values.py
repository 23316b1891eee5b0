"""What the snapshot store is told, and what it tells."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.sessions.snapshots.manifest import Bounds, Skipped


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """Bounds and patience."""

    bounds: Bounds = field(default_factory=Bounds)
    parallel: int = 2
    """Portions (4 MiB) of one save or restore in work at once."""
    blob_seconds: float = 60.0
    """How long one call of the blob store may take."""
    save_seconds: float = 3600.0
    """How long a save may take; shorter than `grace_seconds`."""
    grace_seconds: float = 6 * 3600.0
    """How old a blob that nothing refers to must be before it is removed. Also bears the clocks' difference."""

    def __post_init__(self) -> None:
        if self.save_seconds * 2 > self.grace_seconds:
            raise ValueError("grace_seconds must be at least twice save_seconds: a save's blobs must outlive it")


@dataclass(frozen=True, slots=True)
class Position:
    """Where in its conversation a snapshot was taken."""

    messages: int = 0
    """Messages that the session's own record of the conversation held."""
    exact: bool = False
    """Whether the CLI's transcript in the home holds exactly these, so that the CLI can resume from it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that is current, or was when it was told."""

    id: str
    session: str
    created_at: datetime
    bytes_logical: int
    """Of all files."""
    bytes_stored: int
    """Of all packs that it needs, in the blob store."""
    bytes_written: int
    """Of what this save put into the blob store: packs and list of files."""
    bytes_read: int
    """Of the files that this save read."""
    entries: int
    cli_uuid: str
    cli_version: str
    skipped: tuple[Skipped, ...] = ()
    """The first thousand of what is left out: sockets, devices, links that leave the tree, unreadable files."""
    skipped_count: int = 0
    position: Position = Position()
    torn: tuple[Skipped, ...] = ()
    """Files that were being written each time they were read: their content may be of two moments."""
    unchanged: bool = False
    """Nothing was stored: the snapshot that was current holds the same."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back."""

    home: Path
    work: Path
    cli_uuid: str
    snapshot: Snapshot
    fell_back: bool
    """The current snapshot was damaged: this is the one before it, and it is current now. Tell the caller."""
    damage: str | None = None
    """What was wrong with the current one."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed."""

    blobs: int = 0
    bytes: int = 0
    left: int = 0
    """Sessions that were left alone because a manifest could not be read."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a save or restore is, in bytes of files; the total is known after the scan."""

    done: int
    total: int


OnProgress = Callable[[Progress], None]

Guard = Callable[[AsyncConnection], Awaitable[None]]
"""Runs inside the transaction that makes a snapshot current, before it is committed; what it raises stops that."""
