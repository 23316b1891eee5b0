"""The sessions token of a work item: what a worker of a self-hosted environment serves one session with.

It is `sk-work-<item>-<generation>-<MAC>`: signed with the server's pepper instead of stored, so that a worker that lost
its item can still be told so, while the item's row alone says which generation is good and until when.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from claude_wrapper import ids
from claude_wrapper.tenancy.keyformat import Pepper

PREFIX: Final = "sk-work-"
_SHAPE: Final = re.compile(r"sk-work-([0-9a-z]{1,64})-([0-9]{1,9})-([A-Za-z0-9_-]{43})\Z")


def mint_token(work_id: str, generation: int, pepper: Pepper) -> str:
    """The token of this item (`work_…`) and generation."""
    mac = base64.urlsafe_b64encode(pepper.digest(_signed(work_id, generation))).rstrip(b"=").decode()
    return f"{PREFIX}{work_id.partition('_')[2]}-{generation}-{mac}"


def verified(presented: str, pepper: Pepper) -> tuple[str, int] | None:
    """The item and generation that this server signed the token for; None for anything else."""
    found = _SHAPE.match(presented)
    if found is None:
        return None
    work_id, generation = f"{ids.WORK}_{found[1]}", int(found[2])
    try:
        mac = base64.urlsafe_b64decode(found[3] + "=")
    except (binascii.Error, ValueError):
        return None
    return (work_id, generation) if pepper.matches(_signed(work_id, generation), mac) else None


def _signed(work_id: str, generation: int) -> str:
    # Begins unlike any key, whose digests are made with the same pepper.
    return f"sessions token\0{work_id}\0{generation}"
