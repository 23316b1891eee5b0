"""Blobs: bytes under keys, in a directory, in memory, or in object storage.

One port over obstore, so that `file://`, `memory://`, `s3://`, `gs://` and `az://` behave alike; one contract suite runs
on them. Keys are ours, never a caller's: letters, digits and `._-/=`, no empty or dotted parts. Absence is a value
(None), not an error; a store that is away raises StorageUnavailable.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, from_url

from claude_wrapper.errors import ConfigurationError, RequestTooLarge, StorageUnavailable

_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*\Z")
_ABSENT = (FileNotFoundError, NotFoundError)
MAX_KEY = 512
CHUNK = 1 << 20
DEFAULT_LIMIT = 64 << 20
_SCHEMES = frozenset({"file", "memory", "s3", "gs", "az", "azure", "abfs", "abfss"})


@dataclass(frozen=True, slots=True)
class Blob:
    """What is known of a blob without reading it."""

    key: str
    size: int
    etag: str | None
    modified: datetime


class BlobStore(Protocol):
    """Where blobs are kept."""

    async def put(self, key: str, content: bytes | AsyncIterable[bytes]) -> None:
        """Store, replacing what was there: readers see the old or the new bytes, never a mixture."""
        ...

    async def create(self, key: str, content: bytes) -> bool:
        """Store only if the key is free; whether it was. Of several at once exactly one succeeds."""
        ...

    async def get(self, key: str, *, limit: int = DEFAULT_LIMIT) -> bytes | None:
        """All bytes, or None; raises RequestTooLarge, before reading, for more than `limit`."""
        ...

    async def stream(self, key: str, *, chunk: int = CHUNK) -> AsyncIterator[bytes] | None:
        """The bytes in pieces of about `chunk`, or None."""
        ...

    async def head(self, key: str) -> Blob | None:
        """What is known of it, or None."""
        ...

    def list(self, prefix: str) -> AsyncIterator[Blob]:
        """All blobs under a prefix (whole path parts), in no order."""
        ...

    async def delete(self, *keys: str) -> None:
        """Remove; those that do not exist are no error."""
        ...


@contextmanager
def _mapped(what: str) -> Any:
    try:
        yield
    except (BaseError, OSError) as error:
        # Error texts of object stores quote URLs and headers; the class says enough.
        raise StorageUnavailable(f"the blob store could not {what}: {type(error).__name__}") from error


class ObjectBlobStore:
    """`BlobStore` on any store that obstore knows."""

    def __init__(self, store: Any) -> None:
        self._store = store

    async def put(self, key: str, content: bytes | AsyncIterable[bytes]) -> None:
        source = content if isinstance(content, bytes) else _checked_chunks(content)
        with _mapped("write"):
            await obstore.put_async(self._store, _checked(key), source)

    async def create(self, key: str, content: bytes) -> bool:
        with _mapped("write"):
            try:
                await obstore.put_async(self._store, _checked(key), content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    async def get(self, key: str, *, limit: int = DEFAULT_LIMIT) -> bytes | None:
        with _mapped("read"):
            try:
                found = await obstore.get_async(self._store, _checked(key))
            except _ABSENT:
                return None
            size = found.meta["size"]
            if size > limit:
                raise RequestTooLarge(f"blob {key!r} has {size} bytes, more than the {limit} that may be read at once")
            return bytes(await found.bytes_async())

    async def stream(self, key: str, *, chunk: int = CHUNK) -> AsyncIterator[bytes] | None:
        with _mapped("read"):
            try:
                found = await obstore.get_async(self._store, _checked(key))
            except _ABSENT:
                return None
        return _chunks(found, chunk)

    async def head(self, key: str) -> Blob | None:
        with _mapped("read"):
            try:
                return _blob(await obstore.head_async(self._store, _checked(key)))
            except _ABSENT:
                return None

    async def list(self, prefix: str) -> AsyncIterator[Blob]:
        with _mapped("list"):
            async for batch in obstore.list(self._store, prefix=_checked(prefix.rstrip("/"))):
                for meta in batch:
                    yield _blob(meta)

    async def delete(self, *keys: str) -> None:
        with _mapped("delete"):
            for key in keys:
                try:
                    await obstore.delete_async(self._store, _checked(key))
                except _ABSENT:
                    continue


async def _chunks(found: Any, chunk: int) -> AsyncIterator[bytes]:
    with _mapped("read"):
        async for piece in found.stream(min_chunk_size=chunk):
            yield bytes(piece)


async def _checked_chunks(content: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    async for piece in content:
        if piece:  # an empty part ends some multipart uploads early
            yield piece


def _checked(key: str) -> str:
    if len(key) > MAX_KEY or not _KEY.match(key):
        raise ValueError(f"not a blob key: {key[:80]!r}")
    return key


def _blob(meta: Mapping[str, Any]) -> Blob:
    return Blob(meta["path"], meta["size"], meta.get("e_tag"), meta["last_modified"])


def open_blobs(url: str, *, options: Mapping[str, Any] | None = None) -> ObjectBlobStore:
    """The store of a URL (`file:///dir`, `memory://`, `s3://bucket/prefix`, `gs://…`, `az://…`).

    A directory is created, readable by its owner alone. `options` are obstore's for the scheme (credentials, endpoint,
    region). Raises ConfigurationError.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ConfigurationError(f"blob store {parts.scheme!r} is not supported: use file, memory, s3, gs or az")
    if parts.scheme == "memory":
        return ObjectBlobStore(MemoryStore())
    if parts.scheme == "file":
        return open_directory(Path(parts.path))
    try:
        return ObjectBlobStore(from_url(url, **(dict(options or {}))))
    except (BaseError, ValueError) as error:
        raise ConfigurationError(f"the blob store URL cannot be used: {type(error).__name__}") from error


def open_directory(path: Path) -> ObjectBlobStore:
    """Blobs as files of a directory; raises ConfigurationError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"the blob directory {path} cannot be made: {error.strerror}") from error
    return ObjectBlobStore(LocalStore(path))
