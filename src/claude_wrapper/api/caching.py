"""What a request says of the cache, in its header `cw-cache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from claude_wrapper.broker.calls import CacheUse
from claude_wrapper.errors import InvalidRequest

HEADER: Final = "cw-cache"


def cache_use(headers: Mapping[str, str]) -> CacheUse | None:
    """None: it says nothing. Raises InvalidRequest for a word that is none."""
    value = headers.get(HEADER)
    if value is None:
        return None
    try:
        return CacheUse(value.strip().lower())
    except ValueError:
        raise InvalidRequest(f"must be one of {', '.join(CacheUse)}", field=HEADER) from None
