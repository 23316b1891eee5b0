"""Trying a credential out: one cheap call upstream, and what it says about the credential."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from claude_wrapper.clock import Clock
from claude_wrapper.errors import WrapperError
from claude_wrapper.vault.resolve import Leased


class Validity(enum.StrEnum):
    """What is known of a credential after a call."""

    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """What upstream answered to the call."""

    status: int
    error_type: str | None = None
    upstream_request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of a test."""

    credential_id: str
    validity: Validity
    status: int | None
    message: str
    upstream_request_id: str | None
    seconds: float
    probed_at: datetime


ProbeCall = Callable[[Leased], Awaitable[ProbeAnswer]]
"""The call itself: the broker's, as it knows how each provider is spoken to. Raises WrapperError or OSError."""


async def probe(leased: Leased, call: ProbeCall, clock: Clock) -> Probe:
    """Make the call and judge the answer; raises nothing for what upstream says."""
    start = clock.monotonic()
    status: int | None = None
    request_id: str | None = None
    try:
        answer = await call(leased)
    except (WrapperError, OSError) as error:
        shown = error.message if isinstance(error, WrapperError) else type(error).__name__
        validity, message = Validity.UNKNOWN, f"upstream could not be asked: {shown}"
    else:
        status, request_id = answer.status, answer.upstream_request_id
        validity, message = judge(answer)
    return Probe(leased.id, validity, status, message, request_id, clock.monotonic() - start, clock.now())


def judge(answer: ProbeAnswer) -> tuple[Validity, str]:
    """Pure: what a status says about the credential, not about the call."""
    if 200 <= answer.status < 300:
        return Validity.VALID, "upstream accepts the credential"
    if answer.status == 401:
        return Validity.INVALID, "upstream does not know the credential"
    if answer.status == 403:
        return Validity.INVALID, "upstream knows the credential and does not allow it the call"
    if answer.status in (400, 404, 413, 422, 429):
        # Only who was let in is told that the request is wrong or that there were too many.
        return Validity.VALID, f"upstream accepts the credential and answers {answer.status} ({answer.error_type})"
    return Validity.UNKNOWN, f"upstream answers {answer.status} ({answer.error_type})"
