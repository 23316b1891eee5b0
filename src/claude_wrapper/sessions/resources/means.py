"""What the stores of resources work with, beside a transaction."""

from __future__ import annotations

from dataclasses import dataclass

from claude_wrapper.sessions.resources.outward import Outward
from claude_wrapper.storage.blobs import BlobStore
from claude_wrapper.storage.engine import Database
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.secretstore import SecretStore


@dataclass(frozen=True, slots=True)
class ResourceMeans:
    """Made by the composition root."""

    db: Database
    blobs: BlobStore
    keys: OrgKeys
    secrets: SecretStore
    outward: Outward
    """How MCP servers and token endpoints are asked."""
