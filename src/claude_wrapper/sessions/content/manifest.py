"""What the server has put into a workspace, noted in the workspace itself, so that it moves with its snapshots.

The agent can change the note. That costs nobody but the agent: paths in it are used below its own workspace alone, what
it may read and write is decided by the database every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sessions.content import trees

PATH: Final = ".mnt/.server/content.json"
_MOST: Final = 8 * 2**20


class Output(msgspec.Struct, frozen=True):
    """A file that the session made, as it was when it was kept."""

    size: int
    mtime_ns: int
    file: str
    """The id that it can be downloaded under."""


class Manifest(msgspec.Struct):
    """What lies where."""

    placed: dict[str, str] = {}
    """Path below the workspace by the resource's id."""
    skills: dict[str, str] = {}
    """Version by directory name."""
    memory: dict[str, dict[str, str]] = {}
    """By store: hash by path, as store and directory had them when they last agreed."""
    outputs: dict[str, Output] = {}
    packages: str = ""
    """Hash of the packages that were installed."""


def load(work: Path) -> Manifest:
    """The note of a workspace; an empty one where there is none that can be read. Blocks."""
    try:
        return msgspec.json.decode(trees.read(work, PATH, _MOST), type=Manifest)
    except (NotFound, InvalidRequest, RequestTooLarge, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Manifest()


def save(work: Path, manifest: Manifest) -> None:
    """Write it down, in place of whatever the agent may have put there. Blocks. Raises InvalidRequest."""
    content = msgspec.json.encode(manifest)
    try:
        trees.write(work, PATH, content, mode=0o600)
    except InvalidRequest:
        trees.remove(work, PATH.rpartition("/")[0])
        trees.write(work, PATH, content, mode=0o600)


def copied(manifest: Manifest) -> Manifest:
    """Another one with the same content: to see later whether it was changed."""
    return msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
