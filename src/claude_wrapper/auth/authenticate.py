"""An API key, however it is sent, becomes a `Principal`.

Both `Authorization: Bearer` (the official SDK from version 2 on) and `x-api-key` (curl, older SDKs) are read. The
operator's key is compared as a digest in constant time and never kept in plain text.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Protocol

from claude_wrapper.errors import AuthenticationFailed
from claude_wrapper.tenancy.principal import Principal


class Keys(Protocol):
    """Where keys of organisations are looked up."""

    async def authenticate(self, presented: str | None) -> Principal:
        """Raises AuthenticationFailed."""
        ...


class Workers(Protocol):
    """Where credentials of self-hosted environments' workers are looked up."""

    def knows(self, presented: str) -> bool:
        """Whether it has the form of a worker's credential."""
        ...

    async def authenticate(self, presented: str) -> Principal:
        """Raises AuthenticationFailed."""
        ...


class Authenticator:
    """From request headers to a principal."""

    def __init__(
        self, keys: Keys, *, operator_digest: bytes | None, operator: Principal, workers: Workers | None = None
    ) -> None:
        """`operator_digest` is `digest(key)` of a key given by a setting; `operator` is whom it makes its bearer."""
        self._keys = keys
        self._workers = workers
        self._operator_digest = operator_digest
        self._operator = operator

    async def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """Raises AuthenticationFailed when no key is sent, or one that is unknown, expired or revoked."""
        presented = presented_key(headers)
        if presented is None:
            raise AuthenticationFailed("an API key is needed: send `Authorization: Bearer <key>` or `x-api-key: <key>`")
        if self._operator_digest is not None and hmac.compare_digest(digest(presented), self._operator_digest):
            return self._operator
        if self._workers is not None and self._workers.knows(presented):
            return await self._workers.authenticate(presented)
        return await self._keys.authenticate(presented)


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request carries, or None."""
    key = headers.get("x-api-key")
    if key:
        return key.strip()
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return None


def digest(key: str) -> bytes:
    """What is kept of a key from the settings: two digests are compared, never two secrets. In memory only."""
    return hashlib.sha256(b"claude-wrapper operator key\0" + key.encode()).digest()
