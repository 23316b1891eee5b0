"""What tenancy tells the rest of the server after a commit: whose cached facts are stale."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.storage.engine import announce

CHANNEL = "tenancy.changed"


@dataclass(frozen=True, slots=True)
class Changed:
    """A key, a user, a workspace or a whole organisation changed: forget what you know of it."""

    org: str | None = None
    workspace: str | None = None
    user: str | None = None
    key: str | None = None


def announce_change(
    tx: AsyncConnection,
    *,
    org: str | None = None,
    workspace: str | None = None,
    user: str | None = None,
    key: str | None = None,
) -> None:
    """Tell every replica once this transaction is committed."""
    announce(tx, CHANNEL, msgspec.json.encode(Changed(org, workspace, user, key)))


def read_change(payload: bytes) -> Changed:
    """The announcement; raises msgspec.DecodeError for anything else."""
    return msgspec.json.decode(payload, type=Changed)
