"""Files through the official SDK: streamed, sealed, bounded, and refused where they must be."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator

import aiohttp
import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types.file_expired_error import FileExpiredError
from anthropic.types.file_not_downloadable_error import FileNotDownloadableError
from resources_world import ACME, KEYS, World

from claude_wrapper.errors import RequestTooLarge
from claude_wrapper.sessions.resources import files
from claude_wrapper.sessions.resources.erasing import BlobsOfResources
from claude_wrapper.sessions.resources.files import Upload, clean_filename, clean_mime
from claude_wrapper.sessions.resources.sealed import PIECE, opened, sealed
from claude_wrapper.vault.envelope import Unreadable

pytestmark = pytest.mark.anyio

SECRET_TEXT = b"the quick brown PLANTED fox"


async def test_a_file_comes_back_as_it_was_and_is_sealed_on_disk(world: World, client: AsyncAnthropic) -> None:
    made = await client.beta.files.upload(file=("notes.txt", SECRET_TEXT, "text/plain"))
    assert made.id.startswith("file_")
    assert (made.filename, made.mime_type, made.size_bytes, made.type) == ("notes.txt", "text/plain", 27, "file")
    assert (made.expires_at, made.scope, made.downloadable) == (None, None, True)
    answer = await client.beta.files.download(made.id)
    assert await answer.read() == SECRET_TEXT
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["content-length"] == "27"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''notes.txt"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await client.beta.files.retrieve_metadata(made.id)).model_dump() == made.model_dump()
    assert len(world.stored()) == 1
    assert b"PLANTED" not in world.stored()[0].read_bytes()


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE + 17])
async def test_sizes_around_the_pieces_survive(world: World, size: int) -> None:
    content = bytes(number % 251 for number in range(size))
    made = await world.client().beta.files.upload(file=("x.bin", content))
    assert made.size_bytes == size
    back = await (await world.client().beta.files.download(made.id)).read()
    assert hashlib.sha256(back).digest() == hashlib.sha256(content).digest()


async def test_names_are_reduced_to_their_last_part(client: AsyncAnthropic) -> None:
    odd = await client.beta.files.upload(file=("../../etc/pass wd ü.txt", b"x", "text/plain"))
    assert odd.filename == "pass wd ü.txt"
    answer = await client.beta.files.download(odd.id)
    assert answer.headers["content-disposition"].endswith("''pass%20wd%20%C3%BC.txt")
    await answer.read()


@pytest.mark.parametrize(
    ("given", "mime", "clean"),
    [
        ("", "application/pdf", "unnamed.pdf"),
        ("", "application/octet-stream", "unnamed"),
        ("..", "text/plain", "unnamed.txt"),
        ("C:\\dir\\a.txt", "text/plain", "a.txt"),
        ("a\r\nset-cookie: x", "text/plain", "aset-cookie_ x"),
        ("x" * 600, "text/plain", "x" * 500),
    ],
)
def test_clean_filename(given: str, mime: str, clean: str) -> None:
    assert clean_filename(given, mime) == clean


def test_a_media_type_that_is_none_is_bytes() -> None:
    assert clean_mime("Text/HTML; charset=utf-8") == "text/html"
    assert clean_mime("text/html\r\nx: y") == "application/octet-stream"
    assert clean_mime(None) == "application/octet-stream"


async def test_lists_page_and_pick_by_id(client: AsyncAnthropic) -> None:
    made = [await client.beta.files.upload(file=(f"{number}.txt", b"x")) for number in range(4)]
    assert [one.filename async for one in client.beta.files.list(limit=3)] == ["3.txt", "2.txt", "1.txt", "0.txt"]
    picked = await client.beta.files.list(ids=[made[0].id, made[2].id, "file_nowhere", made[0].id])
    assert ([one.filename for one in picked.data], picked.next_page) == (["2.txt", "0.txt"], None)
    plain = await client.get(f"/v1/files?ids={made[0].id}&ids={made[1].id}", cast_to=object)
    assert [one["filename"] for one in plain["data"]] == ["1.txt", "0.txt"]
    with pytest.raises(anthropic.BadRequestError, match="page or limit"):
        await client.beta.files.list(ids=[made[0].id], limit=5)
    with pytest.raises(anthropic.BadRequestError, match="at most 100"):
        await client.beta.files.list(ids=[f"file_{number}" for number in range(101)])
    for bad in ("0", "1001", "x", "-1"):
        with pytest.raises(anthropic.BadRequestError, match="limit"):
            await client.get(f"/v1/files?limit={bad}", cast_to=object)
    with pytest.raises(anthropic.BadRequestError, match="cursor"):
        await client.beta.files.list(page="page_!!!")


async def test_an_expired_file_is_gone_for_callers_and_then_from_the_disk(world: World, client: AsyncAnthropic) -> None:
    made = await client.beta.files.upload(file=("x.txt", b"x"), expires_in_seconds=3600)
    assert round((made.expires_at - made.created_at).total_seconds()) == 3600
    await world.clock.advance(3601)
    for call in (client.beta.files.retrieve_metadata, client.beta.files.download):
        with pytest.raises(FileExpiredError) as caught:
            await call(made.id)
        assert caught.value.error_code == "file_expired"
    assert [one.id async for one in client.beta.files.list()] == []
    assert len(world.stored()) == 1
    assert await files.purge_expired(world.means.db, world.means.blobs, world.clock) == 1
    assert world.stored() == []
    assert await files.purge_expired(world.means.db, world.means.blobs, world.clock) == 0


async def test_a_life_out_of_bounds_is_refused_and_nothing_is_kept(world: World, client: AsyncAnthropic) -> None:
    for life in (3599, 7776001, -5):
        with pytest.raises(anthropic.BadRequestError, match="expires_in_seconds"):
            await client.beta.files.upload(file=("x.txt", b"x"), expires_in_seconds=life)
    assert world.stored() == []
    assert [one.id async for one in client.beta.files.list()] == []


async def test_what_a_session_made_is_listed_by_its_scope(world: World, client: AsyncAnthropic) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"report"

    upload = Upload("report.md", content(), "text/markdown", scope_id="sesn_1", downloadable=False)
    made = await files.create_file(world.means, KEYS["acme"], world.scribe(), upload)
    await client.beta.files.upload(file=("x.txt", b"x"))
    listed = [one async for one in client.beta.files.list(scope_id="sesn_1")]
    assert [(one.id, one.scope.id) for one in listed] == [(made.id, "sesn_1")]
    with pytest.raises(FileNotDownloadableError):
        await client.beta.files.download(made.id)
    pieces = [piece async for piece in await files.open_file(world.means, made)]
    assert b"".join(pieces) == b"report"


async def test_a_deleted_file_leaves_nothing(world: World, client: AsyncAnthropic) -> None:
    made = await client.beta.files.upload(file=("x.txt", b"x"))
    gone = await client.beta.files.delete(made.id)
    assert (gone.id, gone.type) == (made.id, "file_deleted")
    assert world.stored() == []
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.files.delete(made.id)


async def test_a_file_beyond_the_limit_leaves_nothing(world: World) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(PIECE)

    with pytest.raises(RequestTooLarge):
        await files.create_file(world.means, KEYS["acme"], world.scribe(), Upload("x", endless(), limit=3 * PIECE))
    assert world.stored() == []


BOUNDARY = "XX"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
BAD_BODIES = [
    (b"{}", "application/json", "multipart"),
    (b"", "multipart/form-data", "boundary"),
    (b"", f"multipart/form-data; boundary={BOUNDARY}", "ends in the middle"),
    (b"nonsense", f"multipart/form-data; boundary={BOUNDARY}", "multipart body"),
    (f"{HEAD}cut off".encode(), f"multipart/form-data; boundary={BOUNDARY}", "ends in the middle"),
    (f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}", "multipart|required"),
    (f"{HEAD}x\r\n{HEAD}y\r\n--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}", "twice"),
    (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
        f"multipart/form-data; boundary={BOUNDARY}",
        "no name",
    ),
    (
        f"--{BOUNDARY}\r\nX-Long: {'y' * 20_000}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
        f"multipart/form-data; boundary={BOUNDARY}",
        "head|header",
    ),
]


async def test_damaged_uploads_are_refused_and_leave_nothing(world: World) -> None:
    headers = {"authorization": "Bearer acme"}
    async with aiohttp.ClientSession(world.url, headers=headers) as http:
        for body, kind, says in BAD_BODIES:
            sent = {"content-type": kind}
            async with http.post("/v1/files", data=io.BytesIO(body), headers=sent) as answer:
                found = await answer.json()
                assert answer.status == 400, (body[:80], found)
                assert any(word in found["error"]["message"] for word in says.split("|")), (body[:80], found)
        huge = {"content-type": f"multipart/form-data; boundary={BOUNDARY}", "content-length": str(600 * 10**6)}
        async with http.post("/v1/files", data=io.BytesIO(b"x"), headers=huge) as answer:
            assert answer.status == 413
    assert world.stored() == []


async def test_an_upload_that_is_given_up_leaves_nothing(world: World) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield HEAD.encode() + bytes(2 * PIECE)
        await asyncio.Event().wait()

    headers = {"authorization": "Bearer acme", "content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with aiohttp.ClientSession(world.url, headers=headers) as http:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await http.post("/v1/files", data=stalled())
    assert [one.id async for one in world.client().beta.files.list()] == []


async def test_damage_and_moves_are_noticed(world: World) -> None:
    keys = await world.means.keys.of(ACME)

    async def whole(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def read(frames: bytes, record: str = "file_1") -> bytes:
        pieces = opened(world.means.keys, ACME, "files", record, whole(frames))
        return b"".join([piece async for piece in pieces])

    content = bytes(2 * PIECE + 5)
    frames = [frame async for frame in sealed(keys, "files", "file_1", whole(content))]
    assert len(frames) == 3
    assert await read(b"".join(frames)) == content
    flipped = bytearray(b"".join(frames))
    flipped[-1] ^= 1
    broken = [
        b"",
        frames[0] + frames[1],
        frames[0] + frames[2],
        frames[1] + frames[0] + frames[2],
        b"".join(frames)[:-1],
        b"".join(frames) + frames[2],
        b"\xff\xff\xff\xff" + b"".join(frames),
        bytes(flipped),
    ]
    for one in broken:
        with pytest.raises(Unreadable):
            await read(one)
    with pytest.raises(Unreadable):
        await read(b"".join(frames), record="file_2")


async def test_a_damaged_file_is_an_error_before_the_first_byte(world: World, client: AsyncAnthropic) -> None:
    made = await client.beta.files.upload(file=("x.txt", b"x"))
    path = world.stored()[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(anthropic.APIStatusError) as caught:
        await client.beta.files.download(made.id)
    assert caught.value.status_code == 503


async def test_an_erased_organisation_has_no_bytes_and_the_other_keeps_its_own(world: World) -> None:
    await world.client("acme").beta.files.upload(file=("x.txt", b"x"))
    kept = await world.client("rival").beta.files.upload(file=("y.txt", b"y"))
    eraser = BlobsOfResources(world.means.blobs)
    assert await eraser.erase(ACME) == 1
    assert await eraser.erase(ACME) == 0
    assert await (await world.client("rival").beta.files.download(kept.id)).read() == b"y"
