"""`/v1/files`: uploads go from the socket through encryption into the blob store, downloads the other way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import quote

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from claude_wrapper.api.managed.multipart import OVERHEAD, Multipart, Part
from claude_wrapper.api.managed.resource_common import Call, answer, delete, get, page_answer, post
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources import files
from claude_wrapper.sessions.resources.files import MAX_BYTES, File, Stored, Upload
from claude_wrapper.storage.pagination import MAX_LIMIT, Page, PageRequest


async def upload_file(call: Call) -> Response:
    """A new file, out of a multipart body with the part `file`."""
    call.principal.require(files.WRITE)
    body = Multipart(call.request, limit=MAX_BYTES + OVERHEAD, max_parts=8)
    stored: Stored | None = None
    life: int | None = None
    try:
        async for part in body.parts():
            if part.name == "file":
                if stored is not None:
                    raise InvalidRequest("is there twice; upload one file at a time", field="file")
                stored = await _store(call, body, part)
            elif part.name == "expires_in_seconds":
                life = _seconds(await body.text(part.name))
        if stored is None:
            raise InvalidRequest("is required: a part with the file's content", field="file")
        kept = stored

        async def work(tx: AsyncConnection) -> File:
            return await files.add_file(tx, call.principal, call.scribe, kept, expires_in_seconds=life)

        return answer((await call.write(work)).to_wire())
    except BaseException:
        if stored is not None:
            await files.discard(call.means, call.principal, stored)
        raise


async def _store(call: Call, body: Multipart, part: Part) -> Stored:
    upload = Upload(part.filename or "", body.content(), part.content_type)
    return await files.store_bytes(call.means, call.principal, call.scribe, upload)


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest("must be a whole number of seconds", field="expires_in_seconds")
    return int(text)


async def get_file(call: Call) -> Response:
    """What is known of a file."""
    return answer((await _file(call)).to_wire())


async def _file(call: Call) -> File:
    async def work(tx: AsyncConnection) -> File:
        return await files.get_file(tx, call.principal, call.deps.clock, call.id("file_id", "file"))

    return await call.read(work)


async def list_files(call: Call) -> Response:
    """A page of files."""
    query = call.query
    only = query.many("ids")
    if only is not None and (query.text("page") or query.text("limit")):
        raise InvalidRequest("cannot be given together with page or limit", field="ids")
    request = query.page(most=MAX_LIMIT) if only is None else PageRequest()

    async def work(tx: AsyncConnection) -> Page[File]:
        scope = query.text("scope_id")
        return await files.list_files(tx, call.principal, call.deps.clock, request, only=only, scope_id=scope)

    return page_answer(await call.read(work))


async def download_file(call: Call) -> Response:
    """A file's bytes."""
    file = await _file(call)
    pieces = await files.open_file(call.means, file, download=True)
    # Browsers must neither guess a type nor show what somebody uploaded as a page of ours.
    name = quote(file.filename, safe="")
    return await streamed(
        pieces,
        file.mime_type,
        {
            "content-length": str(file.size_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{name}",
        },
    )


async def streamed(pieces: AsyncIterator[bytes], media_type: str, headers: dict[str, str]) -> Response:
    """A download. The first piece is read before the head is sent: what cannot be opened is an error with a status."""
    first = await anext(pieces, b"")

    async def content() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    safe = {
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
        "cache-control": "private, no-store",
    }
    response = StreamingResponse(content(), headers=headers | safe)
    # Set by hand: the framework would add a charset to text types, which the uploader did not state.
    response.headers["content-type"] = media_type
    return response


async def delete_file(call: Call) -> Response:
    """Delete a file."""
    file_id = call.id("file_id", "file")
    await files.delete_file(call.means, call.principal, call.scribe, file_id)
    return answer({"id": file_id, "type": "file_deleted"})


ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/files", upload_file),
    get("/v1/files", list_files),
    get("/v1/files/{file_id}", get_file),
    delete("/v1/files/{file_id}", delete_file),
    get("/v1/files/{file_id}/content", download_file),
)
