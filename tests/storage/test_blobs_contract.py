"""What a blob store promises, in a directory, in memory and on S3."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from claude_wrapper.errors import ConfigurationError, RequestTooLarge, StorageUnavailable
from claude_wrapper.storage.blobs import BlobStore, open_blobs

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_options(endpoint: str) -> dict[str, object]:
    return {
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": "testing",
        "secret_access_key": "testing",
        "client_options": {"allow_http": True},
        "retry_config": {"max_retries": 0},
    }


@pytest.fixture(params=["file", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "file":
        return open_blobs(f"file://{tmp_path / 'blobs'}")
    if request.param == "memory":
        return open_blobs("memory://")
    endpoint = str(request.getfixturevalue("s3_endpoint"))
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    bucket = f"b{abs(hash(request.node.name)) % 10**9}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket=bucket)
    return open_blobs(f"s3://{bucket}/some/prefix", options=s3_options(endpoint))


async def keys(blobs: BlobStore, prefix: str) -> set[str]:
    return {blob.key async for blob in blobs.list(prefix)}


async def test_what_is_put_comes_back_and_can_be_replaced(blobs: BlobStore) -> None:
    await blobs.put("a/b", b"one")
    await blobs.put("a/b", b"\x00two\xff")
    assert await blobs.get("a/b") == b"\x00two\xff"
    found = await blobs.head("a/b")
    assert found is not None
    assert (found.key, found.size) == ("a/b", 5)


async def test_what_is_absent_is_none_and_deleting_it_is_no_error(blobs: BlobStore) -> None:
    assert await blobs.get("nothing") is None
    assert await blobs.head("nothing") is None
    assert await blobs.stream("nothing") is None
    await blobs.delete("nothing")


async def test_of_several_that_create_one_key_exactly_one_succeeds(blobs: BlobStore) -> None:
    done = await asyncio.gather(*(blobs.create("lock", b"%d" % n) for n in range(8)))
    assert sum(done) == 1
    assert await blobs.get("lock") == b"%d" % done.index(True)


async def test_a_large_blob_streams_in_and_out_in_pieces(blobs: BlobStore) -> None:
    piece = os.urandom(1 << 20)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield piece
            yield b""

    await blobs.put("large", source())
    pieces = await blobs.stream("large", chunk=1 << 20)
    assert pieces is not None
    got = [part async for part in pieces]
    assert b"".join(got) == piece * 12
    assert max(len(part) for part in got) <= 16 << 20


async def test_a_source_that_fails_leaves_the_old_blob(blobs: BlobStore) -> None:
    async def source() -> AsyncIterator[bytes]:
        yield os.urandom(6 << 20)
        raise RuntimeError("the reader broke")

    await blobs.put("k", b"old")
    with pytest.raises((RuntimeError, StorageUnavailable)):
        await blobs.put("k", source())
    assert await blobs.get("k") == b"old"


async def test_more_than_the_limit_is_refused_before_it_is_read(blobs: BlobStore) -> None:
    await blobs.put("k", b"x" * 100)
    assert await blobs.get("k", limit=100) == b"x" * 100
    with pytest.raises(RequestTooLarge, match="100 bytes"):
        await blobs.get("k", limit=99)


async def test_a_listing_holds_what_is_under_the_prefix_and_nothing_else(blobs: BlobStore) -> None:
    for key in ("org_1/a", "org_1/b/c", "org_10/a", "org_2/a"):
        await blobs.put(key, b"x")
    assert await keys(blobs, "org_1") == {"org_1/a", "org_1/b/c"}
    assert await keys(blobs, "org_1/") == {"org_1/a", "org_1/b/c"}
    assert await keys(blobs, "org_3") == set()


async def test_deleting_removes_those_keys_alone(blobs: BlobStore) -> None:
    for key in ("a", "b", "c"):
        await blobs.put(key, b"x")
    await blobs.delete("a", "missing", "b")
    assert (await blobs.get("a"), await blobs.get("b"), await blobs.get("c")) == (None, None, b"x")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a b", "a\x00b", "ä", "a" * 513]
)
async def test_a_key_that_could_mean_something_else_is_refused(blobs: BlobStore, key: str) -> None:
    for attempt in (blobs.put(key, b""), blobs.get(key), blobs.head(key), blobs.delete(key), blobs.create(key, b"")):
        with pytest.raises(ValueError, match="not a blob key"):
            await attempt


async def test_a_directory_is_readable_by_its_owner_alone_and_links_lead_nowhere_new(tmp_path: Path) -> None:
    blobs = open_blobs(f"file://{tmp_path / 'blobs'}")
    await blobs.put("a", b"x")
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o700


async def test_a_store_that_is_away_is_storage_unavailable_and_shows_no_secret() -> None:
    blobs = open_blobs("s3://bucket", options=s3_options("http://127.0.0.1:1"))
    with pytest.raises(StorageUnavailable) as caught:
        await blobs.get("k")
    assert "testing" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "nonsense", ""])
async def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_blobs(url)
