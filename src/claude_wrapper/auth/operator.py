"""The operator's own key: given by a setting, or made at the first start and kept only as a digest."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from claude_wrapper.auth.authenticate import digest
from claude_wrapper.errors import ConfigurationError

_FILE: Final = "operator-key.sha256"
_SHORTEST: Final = 16


def operator_key(data_dir: Path, given: str | None) -> tuple[bytes, str | None]:
    """(digest of the operator's key, the key itself if it was made just now).

    Raises ConfigurationError for a key that is too short to be a secret, or a digest file that cannot be read.
    """
    if given is not None:
        if len(given) < _SHORTEST:
            raise ConfigurationError(f"CLAUDE_WRAPPER_ADMIN_KEY: must have at least {_SHORTEST} characters")
        return digest(given), None
    path = data_dir / _FILE
    if path.exists():
        try:
            return bytes.fromhex(path.read_text(encoding="ascii").strip()), None
        except ValueError as error:
            raise ConfigurationError(f"{path} is damaged; remove it to have a new key made") from error
    key = f"sk-cw-operator-{secrets.token_urlsafe(32)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(digest(key).hex() + "\n")
    return digest(key), key
