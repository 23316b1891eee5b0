"""What the stores of agents, files, vaults and memory work with: blobs, secrets and a way out."""

from __future__ import annotations

from pathlib import Path

import structlog

from claude_wrapper.app.tenants import Tenants
from claude_wrapper.broker.addresses import Network
from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.sessions.resources.files import purge_expired
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.outward import HttpOutward
from claude_wrapper.storage.blobs import BlobStore, open_blobs, open_directory
from claude_wrapper.vault.secretstore import SecretStore

log = structlog.get_logger(__name__)


def resource_means(
    settings: Settings, data_dir: Path, tenants: Tenants, clock: Clock, ids: Ids, *, permitted: tuple[Network, ...]
) -> ResourceMeans:
    """Raises ConfigurationError for a blob store that cannot be used."""
    return ResourceMeans(
        db=tenants.database,
        blobs=_blobs(settings.blob_url, data_dir),
        keys=tenants.org_keys,
        secrets=SecretStore(tenants.database, tenants.org_keys, clock, ids),
        outward=HttpOutward(permitted=permitted),
    )


async def purge_expired_files(means: ResourceMeans, clock: Clock, seconds: float) -> None:
    """Upkeep, until it is cancelled: files whose time is over leave the blob store."""
    while True:
        await clock.sleep(seconds)
        try:
            await purge_expired(means.db, means.blobs, clock)
        except StorageUnavailable as error:
            log.warning("files.expired_not_purged", cause=error.message)


def _blobs(url: str | None, data_dir: Path) -> BlobStore:
    if url is None:
        return open_directory(data_dir / "blobs")
    return open_blobs(url) if "://" in url else open_directory(Path(url).expanduser())
