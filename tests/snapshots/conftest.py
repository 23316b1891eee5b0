"""Fixtures of the snapshots' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from snapshots_world import OURS, THEIRS, Bench, bench

from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import BlobStore, open_blobs

_KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """A directory and an S3."""
    if request.param == "file":
        return open_blobs(f"file://{tmp_path / 'blobs'}")
    endpoint = str(request.getfixturevalue("s3_url"))
    bucket = f"b{abs(hash(request.node.nodeid)) % 10**12}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **_KEYS).create_bucket(Bucket=bucket)
    options = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": "testing",
        "secret_access_key": "testing",
        "client_options": {"allow_http": True},
        "retry_config": {"max_retries": 0},
    }
    return open_blobs(f"s3://{bucket}/some/prefix", options=options)


@pytest.fixture
async def everywhere(database: Database, blobs: BlobStore, tmp_path: Path) -> Bench:
    """SQLite and Postgres, each with a directory and with S3."""
    return await bench(database, blobs, tmp_path)


@pytest.fixture
async def here(sqlite_url: str, tmp_path: Path, anyio_backend: str) -> object:
    """SQLite and a directory: for what does not depend on them."""
    db = Database(sqlite_url)
    yield await bench(db, open_blobs(f"file://{tmp_path / 'blobs'}"), tmp_path)
    await db.close(grace=5)


__all__ = ["OURS", "THEIRS"]
