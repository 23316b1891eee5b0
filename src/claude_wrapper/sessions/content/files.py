"""The files of a session, written into its workspace."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import WrapperError
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.acting import Acting
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.resources.files import File, get_file, open_file
from claude_wrapper.sessions.resources.means import ResourceMeans


async def put_files(
    acting: Acting, wanted: Sequence[Mapping[str, Any]], work: Path, manifest: Manifest
) -> tuple[list[str], list[str]]:
    """Write the files (resources as the API shows them) that are not there yet: their paths, and what went wrong.

    A file that was put there before is the agent's from then on: it is not written again.
    """
    placed: list[str] = []
    told: list[str] = []
    for one in wanted:
        if one["id"] in manifest.placed:
            continue
        path = str(one["mount_path"])
        try:
            file = await _file(acting, str(one["file_id"]))
            await _put(acting.means, file, work, places.relative(path))
        except WrapperError as error:
            told.append(f"file {one['file_id']} is not mounted at {path}: {error.message}")
        else:
            manifest.placed[one["id"]] = places.relative(path)
            placed.append(path)
    return placed, told


async def _file(acting: Acting, file_id: str) -> File:
    async def read(tx: AsyncConnection) -> File:
        return await get_file(tx, acting.principal, acting.scribe.clock, file_id)

    return await acting.read(read)


async def _put(means: ResourceMeans, file: File, work: Path, path: str) -> None:
    pieces = await open_file(means, file)
    incoming = await asyncio.to_thread(trees.begin, work, path)
    try:
        async for piece in pieces:
            await asyncio.to_thread(incoming.file.write, piece)
        await asyncio.to_thread(incoming.finish)
    except OSError as error:
        raise WrapperError(f"it cannot be written: {error.strerror}") from error
    finally:
        incoming.abandon()
