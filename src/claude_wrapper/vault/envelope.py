"""Sealing records with an organisation's data key: AES-256-GCM, a fresh nonce each time, bound to where it stands.

A sealed record is `format (1) | key version (4, big endian) | nonce (12) | ciphertext and tag`. The additional data are
format, key version, organisation, table, record id and field: a ciphertext that is moved to another row, table, column
or tenant does not open. One key with random nonces is good for 2^32 records; keys have versions, so it can be changed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from claude_wrapper.errors import VaultSealed
from claude_wrapper.vault.keys import KEY_BYTES, RandomBytes

_FORMAT: Final = 1
_HEAD: Final = struct.Struct(">BI")
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
OVERHEAD: Final = _HEAD.size + _NONCE_BYTES + _TAG_BYTES
"""Bytes that sealing adds."""


class Unreadable(VaultSealed):
    """A sealed record cannot be opened."""


class UnknownKeyVersion(Unreadable):
    """A sealed record names a data key that is not loaded: it may have been made by another replica since."""


def key_version_of(sealed: bytes) -> int:
    """The version of the data key that a record was sealed with. Raises Unreadable."""
    if len(sealed) < OVERHEAD:
        raise Unreadable("a sealed record is too short: it was damaged")
    form, version = _HEAD.unpack_from(sealed)
    if form != _FORMAT:
        raise Unreadable(f"a sealed record has format {form}, which this version does not know")
    return int(version)


class DataKeys:
    """The data keys of one organisation, unwrapped. The highest version seals; all of them open."""

    __slots__ = ("_ciphers", "_fingerprint_key", "_newest", "_random", "org")

    def __init__(self, org: str, keys: Mapping[int, bytes], *, random: RandomBytes = secrets.token_bytes) -> None:
        """`keys` are 32 bytes each, by version."""
        if not keys or any(len(key) != KEY_BYTES for key in keys.values()):
            raise ValueError("data keys have 32 bytes, and there is at least one")
        self.org = org
        self._ciphers = {version: AESGCM(key) for version, key in keys.items()}
        self._newest = max(keys)
        self._random = random
        # From the first key: fingerprints stay comparable when later keys are added.
        self._fingerprint_key = hmac.new(keys[min(keys)], b"claude-wrapper fingerprint", hashlib.sha256).digest()

    def __repr__(self) -> str:
        return f"DataKeys({self.org}, versions {sorted(self._ciphers)})"

    @property
    def versions(self) -> frozenset[int]:
        """The versions that open."""
        return frozenset(self._ciphers)

    @property
    def newest(self) -> int:
        """The version that seals."""
        return self._newest

    def seal(self, plain: bytes, *, table: str, record: str, field: str = "") -> bytes:
        """Encrypt for this place."""
        head = _HEAD.pack(_FORMAT, self._newest)
        nonce = self._random(_NONCE_BYTES)
        bound = _bound(head, self.org, table, record, field)
        return head + nonce + self._ciphers[self._newest].encrypt(nonce, plain, bound)

    def open(self, sealed: bytes, *, table: str, record: str, field: str = "") -> bytes:
        """Decrypt what was sealed for this place. Raises Unreadable when a byte or the place differs."""
        version = key_version_of(sealed)
        cipher = self._ciphers.get(version)
        if cipher is None:
            raise UnknownKeyVersion(f"the data key version {version} of {self.org} is not there")
        head, rest = sealed[: _HEAD.size], sealed[_HEAD.size :]
        try:
            return cipher.decrypt(
                rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], _bound(head, self.org, table, record, field)
            )
        except InvalidTag:
            raise Unreadable(f"{table} {record} does not open: it was damaged or moved here") from None

    def seal_values(self, values: Mapping[str, Any], *, table: str, record: str) -> bytes:
        """Encrypt a JSON object."""
        return self.seal(msgspec.json.encode(dict(values)), table=table, record=record)

    def open_values(self, sealed: bytes, *, table: str, record: str) -> dict[str, Any]:
        """The reverse. Raises Unreadable."""
        values: dict[str, Any] = msgspec.json.decode(self.open(sealed, table=table, record=record))
        return values

    def fingerprint(self, secret: str) -> str:
        """Tells whether two secrets of this organisation are the same; tells nothing else, and nothing across tenants."""
        return hmac.new(self._fingerprint_key, secret.encode(), hashlib.sha256).hexdigest()[:32]


def _bound(head: bytes, *parts: str) -> bytes:
    """Length-prefixed, so that no two different places give the same bytes."""
    encoded = [part.encode() for part in parts]
    return head + b"".join(struct.pack(">I", len(part)) + part for part in encoded)
