"""Typed, prefixed identifiers and their generator.

An identifier is `<prefix>_<26 base-32 characters>` (130 random bits). Prefixes follow the Anthropic API where it has
one (`docs/glossary.md`). Clients must treat identifiers as opaque strings.
"""

from __future__ import annotations

import re
import secrets
import uuid
from typing import Protocol

ORG = "org"
WORKSPACE = "wrkspc"
USER = "user"
API_KEY = "apikey"
ENVIRONMENT_KEY = "envkey"
WORK = "work"
INVITE = "invite"
SESSION = "sesn"
TURN = "turn"
EVENT = "sevt"
SLOT = "slot"
REQUEST = "req"
MESSAGE = "msg"
CREDENTIAL = "cred"
CALL = "call"

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, lower case: no i, l, o, u
_TO_ALPHABET = bytes(ord(_ALPHABET[value % 32]) for value in range(256))  # 256 is a multiple of 32: no bias
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
_SHAPE = re.compile(r"[a-z]+_[0-9A-Za-z_-]{1,120}\Z")


class Ids(Protocol):
    """Where new identifiers come from; injected so that tests are repeatable."""

    def new(self, prefix: str) -> str:
        """A fresh identifier with this prefix."""
        ...

    def uuid(self) -> str:
        """A fresh version-4 UUID: what the Claude CLI uses for sessions and messages."""
        ...


class RandomIds:
    """Identifiers from the operating system's random source."""

    def new(self, prefix: str) -> str:
        # One system call for all characters: 26 calls of secrets.choice cost 43 us, a tenth of a broker call.
        return f"{prefix}_" + secrets.token_bytes(26).translate(_TO_ALPHABET).decode("ascii")

    def uuid(self) -> str:
        return str(uuid.uuid4())


def is_uuid(value: str) -> bool:
    """Whether it is a UUID in its usual form, in lower case: what the Claude CLI names its sessions with."""
    return _UUID.match(value) is not None


def well_formed(value: str, prefix: str | None = None) -> bool:
    """Whether `value` could be an identifier of ours: one prefix, then only letters, digits, `_` and `-`.

    Anything else (a path, a NUL, a space) is refused before it reaches a file name or a query.
    """
    return bool(_SHAPE.match(value)) and (prefix is None or value.startswith(prefix + "_"))
