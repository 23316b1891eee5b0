"""What a session leaves in its outputs directory becomes files of the API, with the session as their scope."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge, WrapperError
from claude_wrapper.sandbox.files import Entry, open_beneath
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.acting import Acting
from claude_wrapper.sessions.content.manifest import Manifest, Output
from claude_wrapper.sessions.resources import files
from claude_wrapper.sessions.resources.files import Upload

MAX_FILES: Final = 100
MAX_BYTES: Final = 100 * 2**20
"""Of the files that one turn adds or changes."""
_TOP: Final = places.relative(places.OUTPUTS)
_PIECE: Final = 1 << 20


async def collect(acting: Acting, work: Path, manifest: Manifest) -> list[str]:
    """Keep what is new or changed, in place of what it was before. What could not be kept, with the reason."""
    told: list[str] = []
    left = MAX_BYTES
    try:
        found = await asyncio.to_thread(_entries, work)
    except RequestTooLarge:
        return [f"{places.OUTPUTS} holds more than {MAX_FILES} files: nothing of it was kept"]
    for entry in found:
        if trees.shown(entry.path) != entry.path:
            told.append(f"{places.OUTPUTS}/{trees.shown(entry.path)} was not kept: {trees.NOT_UTF8}")
            continue
        known = manifest.outputs.get(entry.path)
        if known is not None and (known.size, known.mtime_ns) == (entry.size, entry.mtime_ns):
            continue
        try:
            if entry.size > left:
                raise RequestTooLarge(f"more than {MAX_BYTES} bytes in one turn")
            name = entry.path.replace("/", "_")
            upload = Upload(name, _content(work, f"{_TOP}/{entry.path}"), scope_id=acting.session, limit=left)
            kept = await files.create_file(acting.means, acting.principal, acting.scribe, upload)
            left -= kept.size_bytes
            manifest.outputs[entry.path] = Output(entry.size, entry.mtime_ns, kept.id)
            if known is not None:
                await _forget(acting, known.file)
        except WrapperError as error:
            told.append(f"{places.OUTPUTS}/{entry.path} was not kept: {error.message}")
    return told


def _entries(work: Path) -> list[Entry]:
    return [one for one in trees.entries(work, _TOP, most=MAX_FILES) if one.kind == "file"]


async def _content(work: Path, path: str) -> AsyncIterator[bytes]:
    descriptor = await asyncio.to_thread(open_beneath, work, path)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequest("is not a regular file")
        while piece := await asyncio.to_thread(file.read, _PIECE):
            yield piece


async def _forget(acting: Acting, file_id: str) -> None:
    """Delete what a file was before. The id comes out of the workspace, which the agent can write: only a file that
    this very session made goes."""

    async def read(tx: AsyncConnection) -> bool:
        file = await files.get_file(tx, acting.principal, acting.scribe.clock, file_id)
        return file.scope_id == acting.session

    with contextlib.suppress(NotFound):
        if await acting.read(read):
            await files.delete_file(acting.means, acting.principal, acting.scribe, file_id)
