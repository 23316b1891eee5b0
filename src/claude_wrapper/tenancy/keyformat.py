"""How an API key looks and how it is stored: pure functions.

A key is `sk-cw-<id>-<secret>`: the random part of the key's identifier, so that it can be looked up, and 256 random bits
in URL-safe base 64. The database holds HMAC-SHA256 of the whole key under a pepper that is not in the database: a copy
of the database opens nothing, and a slow hash is not needed for 256 random bits.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from claude_wrapper import ids
from claude_wrapper.errors import ConfigurationError

PREFIX = "sk-cw-"
ENVIRONMENT_PREFIX = "sk-env-"
"""Of the keys of self-hosted environments' workers."""
_REST = re.compile(r"([0-9a-z]{1,64})-[A-Za-z0-9_-]{43}\Z")
MIN_PEPPER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Pepper:
    """The server's secret for digests; `previous` ones still verify, so that it can be changed without new keys."""

    current: bytes = field(repr=False)
    previous: tuple[bytes, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if any(len(pepper) < MIN_PEPPER_BYTES for pepper in (self.current, *self.previous)):
            raise ConfigurationError(f"the API key pepper needs at least {MIN_PEPPER_BYTES} bytes")

    def digest(self, key: str) -> bytes:
        """What is stored for a new key: 32 bytes."""
        return hmac.digest(self.current, key.encode(), "sha256")

    def matches(self, key: str, digest: bytes) -> bool:
        """Whether the digest is of this key, in constant time."""
        encoded = key.encode()
        if hmac.compare_digest(hmac.digest(self.current, encoded, "sha256"), digest):
            return True
        return any(hmac.compare_digest(hmac.digest(old, encoded, "sha256"), digest) for old in self.previous)


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key; `secret` is the whole key and is shown once."""

    id: str
    secret: str = field(repr=False)
    digest: bytes = field(repr=False)
    hint: str


def mint(
    key_id: str, pepper: Pepper, entropy: Callable[[int], bytes] = secrets.token_bytes, *, prefix: str = PREFIX
) -> MintedKey:
    """A key for this identifier (`apikey_…`)."""
    lookup = key_id.partition("_")[2]
    secret = f"{prefix}{lookup}-{_encode(entropy(32))}"
    if _lookup(secret, prefix) is None:
        raise ValueError("the identifier of a key must be lower-case letters and digits after its prefix")
    return MintedKey(key_id, secret, pepper.digest(secret), f"{prefix}{lookup[:4]}...{secret[-4:]}")


def parse(presented: str) -> str | None:
    """The identifier (`apikey_…`) that a presented key names, or None if it has not the shape of a key."""
    lookup = _lookup(presented, PREFIX)
    return f"{ids.API_KEY}_{lookup}" if lookup else None


def parse_environment_key(presented: str) -> str | None:
    """The identifier (`envkey_…`) that a presented key of an environment names, or None."""
    lookup = _lookup(presented, ENVIRONMENT_PREFIX)
    return f"{ids.ENVIRONMENT_KEY}_{lookup}" if lookup else None


def _lookup(presented: str, prefix: str) -> str | None:
    found = _REST.match(presented.removeprefix(prefix)) if presented.startswith(prefix) else None
    return found[1] if found else None


def mint_token(entropy: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """256 random bits for an invitation."""
    return _encode(entropy(32))


def token_digest(token: str) -> bytes:
    """What is stored of an invitation's token."""
    return hashlib.sha256(token.encode()).digest()


def _encode(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
