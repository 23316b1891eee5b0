"""What callers may write into the fields of tenancy: bounds and shapes, with errors that name the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from claude_wrapper.errors import InvalidRequest

MAX_NAME = 200
MAX_MODELS = 100
MAX_LIMITS = 32
MAX_RATES = 4
MAX_TAGS = 16
_MODEL = re.compile(r"[A-Za-z0-9._:@/\-\[\]]{1,128}\*?\Z|\*\Z")
_LIMIT = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_EMAIL = re.compile(r"[^@\s\x00-\x1f<>()\[\],;:\\\"]{1,64}@[A-Za-z0-9.-]{1,255}\Z")
_COLOR = re.compile(r"#[0-9A-Fa-f]{6}\Z")


def clean_name(value: str, *, field: str = "name") -> str:
    """Trimmed, not empty, without control characters, at most 200 characters."""
    name = value.strip()
    if not name or len(name) > MAX_NAME or any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise InvalidRequest(f"must have 1 to {MAX_NAME} printable characters", field=field)
    return name


def clean_email(value: str, *, field: str = "email") -> str:
    """Lower-cased; a person is found by it whatever the spelling."""
    email = value.strip().lower()
    if not _EMAIL.match(email):
        raise InvalidRequest("is not an email address", field=field)
    return email


def clean_color(value: str, *, field: str = "display_color") -> str:
    """`#` and six hexadecimal digits."""
    if not _COLOR.match(value):
        raise InvalidRequest("must look like #6C5BB9", field=field)
    return value


def clean_models(values: Sequence[str], *, field: str = "allowed_models") -> list[str]:
    """Model names; the last character may be `*`."""
    if len(values) > MAX_MODELS:
        raise InvalidRequest(f"at most {MAX_MODELS} models", field=field)
    for index, value in enumerate(values):
        if not _MODEL.match(value):
            raise InvalidRequest(f"{value[:50]!r} is not a model name", field=f"{field}[{index}]")
    return sorted(set(values))


def clean_limits(values: Mapping[str, Any], *, field: str = "limits") -> dict[str, Any]:
    """Names to whole numbers, short texts (`100/hour`) or lists of those; what they mean is decided by `limits`."""
    if len(values) > MAX_LIMITS:
        raise InvalidRequest(f"at most {MAX_LIMITS} limits", field=field)
    for name, value in values.items():
        if not _LIMIT.match(name):
            raise InvalidRequest("is not the name of a limit", field=f"{field}.{name[:50]}")
        parts = value if isinstance(value, list) else [value]
        if not 1 <= len(parts) <= MAX_RATES or not all(_is_limit(part) for part in parts):
            raise InvalidRequest("must be a whole number of 0 or more, or a rate", field=f"{field}.{name}")
    return dict(values)


def _is_limit(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= 64 and value.isprintable()
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def clean_tags(values: Mapping[str, str], *, field: str = "tags") -> dict[str, str]:
    """At most 16 pairs, keys up to 64 characters, values up to 512; no key begins with `anthropic`."""
    if len(values) > MAX_TAGS:
        raise InvalidRequest(f"at most {MAX_TAGS} tags", field=field)
    for name, value in values.items():
        if not 1 <= len(name) <= 64 or name.lower().startswith("anthropic"):
            raise InvalidRequest("tag keys have 1 to 64 characters and do not begin with anthropic", field=field)
        if not isinstance(value, str) or len(value) > 512:
            raise InvalidRequest("tag values have at most 512 characters", field=f"{field}.{name}")
    return dict(values)
