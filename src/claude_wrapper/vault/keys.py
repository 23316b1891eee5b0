"""Master keys: what wraps the data keys of organisations.

The port has two adapters: keys in memory (from a file or a setting) and a cloud KMS behind a narrow client. Several
keys may be readable at once, one is primary: that is how a master key is changed without a stop (`vault.rotation`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from claude_wrapper.errors import ConfigurationError, VaultSealed

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_FORMAT: Final = b"\x01"

RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A data key under a master key."""

    key_id: str
    """The master key that opens it."""
    blob: bytes


class MasterKey(Protocol):
    """Wraps and unwraps data keys. `context` is bound in: a wrapped key only opens for the context it was made for."""

    @property
    def primary(self) -> str:
        """The id of the key that new data keys are wrapped with."""
        ...

    @property
    def readable(self) -> frozenset[str]:
        """The ids of all keys that can unwrap."""
        ...

    async def wrap(self, plain: bytes, context: bytes) -> Wrapped:
        """Wrap with the primary key. Raises VaultSealed when the key cannot be used now."""
        ...

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        """Unwrap. Raises VaultSealed when the key is not readable, is wrong, or the blob or the context was changed."""
        ...


@dataclass(frozen=True, slots=True)
class KeyMaterial:
    """One master key of 32 bytes."""

    material: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.material) != KEY_BYTES:
            raise ConfigurationError(f"a master key has {KEY_BYTES} bytes, this one has {len(self.material)}")

    @property
    def id(self) -> str:
        """Derived from the key itself, so that nobody has to keep names and keys together. Tells nothing of the key."""
        return "mk_" + hmac.new(self.material, b"claude-wrapper master key id", hashlib.sha256).hexdigest()[:24]


class LocalMasterKey:
    """Master keys that this process holds: AES-256-GCM with a random nonce for each data key."""

    def __init__(self, keys: Sequence[KeyMaterial], *, random: RandomBytes = secrets.token_bytes) -> None:
        """The first key is the primary one. Raises ConfigurationError without any."""
        if not keys:
            raise ConfigurationError("the vault needs a master key")
        self._primary = keys[0].id
        self._ciphers = {key.id: AESGCM(key.material) for key in keys}
        self._random = random

    def __repr__(self) -> str:
        return f"LocalMasterKey({', '.join(self._ciphers)})"

    @property
    def primary(self) -> str:
        return self._primary

    @property
    def readable(self) -> frozenset[str]:
        return frozenset(self._ciphers)

    async def wrap(self, plain: bytes, context: bytes) -> Wrapped:
        nonce = self._random(_NONCE_BYTES)
        sealed = self._ciphers[self._primary].encrypt(nonce, plain, _FORMAT + context)
        return Wrapped(self._primary, _FORMAT + nonce + sealed)

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        cipher = self._ciphers.get(wrapped.key_id)
        if cipher is None:
            raise missing_key(wrapped.key_id)
        head, nonce, sealed = wrapped.blob[:1], wrapped.blob[1 : 1 + _NONCE_BYTES], wrapped.blob[1 + _NONCE_BYTES :]
        try:
            if head != _FORMAT:
                raise InvalidTag
            return cipher.decrypt(nonce, sealed, _FORMAT + context)
        except (InvalidTag, ValueError):
            raise VaultSealed(
                f"a data key does not open with the master key {wrapped.key_id}: it was damaged or moved"
            ) from None


class KmsClient(Protocol):
    """What the vault needs of a cloud KMS: AWS `Encrypt`/`Decrypt` with an encryption context, Google's with AAD."""

    async def encrypt(self, key: str, plain: bytes, context: bytes) -> bytes:
        """Encrypt at most 4 KB under the named key."""
        ...

    async def decrypt(self, key: str, blob: bytes, context: bytes) -> bytes:
        """The reverse. Raises KmsError for a wrong key, blob or context; OSError or TimeoutError when it is away."""
        ...


class KmsError(Exception):
    """The KMS answered, and said no."""


class KmsMasterKey:
    """Master keys that stay in a KMS; one call per organisation and start, as data keys are cached unwrapped."""

    def __init__(self, client: KmsClient, primary: str, also_readable: Sequence[str] = ()) -> None:
        """Key names are the KMS's own (an ARN, a resource name)."""
        self._client = client
        self._primary = primary
        self._readable = frozenset({primary, *also_readable})

    @property
    def primary(self) -> str:
        return self._primary

    @property
    def readable(self) -> frozenset[str]:
        return self._readable

    async def wrap(self, plain: bytes, context: bytes) -> Wrapped:
        try:
            return Wrapped(self._primary, await self._client.encrypt(self._primary, plain, context))
        except (KmsError, OSError) as error:
            raise VaultSealed(f"the KMS does not encrypt with {self._primary}: {type(error).__name__}") from error

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        if wrapped.key_id not in self._readable:
            raise missing_key(wrapped.key_id)
        try:
            return await self._client.decrypt(wrapped.key_id, wrapped.blob, context)
        except (KmsError, OSError) as error:
            raise VaultSealed(f"the KMS does not decrypt with {wrapped.key_id}: {type(error).__name__}") from error


def missing_key(key_id: str) -> VaultSealed:
    """The error that says which key is needed."""
    return VaultSealed(f"the master key {key_id} is needed and was not given; add it beside the present one")


def parse_keys(text: str, *, source: str) -> tuple[KeyMaterial, ...]:
    """Keys in base64, separated by commas, spaces or lines; the first is primary. `#` begins a comment.

    `source` (a file, a setting) is named in the ConfigurationError; the text never is.
    """
    words = " ".join(line.split("#")[0] for line in text.splitlines()).replace(",", " ").split()
    if not words:
        raise ConfigurationError(f"{source}: there is no master key in it")
    keys = []
    for number, word in enumerate(words, 1):
        try:
            material = base64.b64decode(
                word.replace("-", "+").replace("_", "/") + "=" * (-len(word) % 4), validate=True
            )
        except (binascii.Error, ValueError):
            raise ConfigurationError(f"{source}: key {number} is not base64") from None
        if len(material) != KEY_BYTES:
            raise ConfigurationError(f"{source}: key {number} has {len(material)} bytes, not {KEY_BYTES}")
        keys.append(KeyMaterial(material))
    if len({key.id for key in keys}) != len(keys):
        raise ConfigurationError(f"{source}: the same key is there twice")
    return tuple(keys)


def read_key_file(path: Path) -> tuple[KeyMaterial, ...]:
    """The keys of a file that nobody else may read. Raises ConfigurationError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, encoding="ascii") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            text = opened.read(65_536)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: the master key cannot be read: {type(error).__name__}") from error
    if mode & 0o077:
        raise ConfigurationError(f"{path}: others may read the master key; run chmod 600 on it")
    return parse_keys(text, source=str(path))


def create_key_file(path: Path, *, random: RandomBytes = secrets.token_bytes) -> KeyMaterial:
    """A new key in a new file of mode 0600. Raises FileExistsError: a key is never overwritten."""
    key = KeyMaterial(random(KEY_BYTES))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as opened:
        opened.write(base64.b64encode(key.material).decode() + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    return key
