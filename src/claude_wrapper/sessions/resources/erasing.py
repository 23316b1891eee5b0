"""The end of an organisation: its bytes in the blob store."""

from __future__ import annotations

from dataclasses import dataclass

from claude_wrapper.storage.blobs import BlobStore


@dataclass(slots=True)
class BlobsOfResources:
    """An eraser of `tenancy.deletion`: files and skills. Their rows go with the organisation's other rows."""

    blobs: BlobStore
    name: str = "files_and_skills"

    async def erase(self, org: str) -> int:
        """Delete all bytes of this organisation; how many things. May be called again."""
        count = 0
        for kind in ("files", "skills"):
            keys = [blob.key async for blob in self.blobs.list(f"{kind}/{org}")]
            await self.blobs.delete(*keys)
            count += len(keys)
        return count
