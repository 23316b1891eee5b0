"""The token endpoint of OAuth 2.0 (RFC 6749, section 6): asking for a new access token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
import msgspec

from claude_wrapper.errors import UpstreamUnavailable

MAX_ANSWER: Final = 64 * 1024
_REASONS: Final = frozenset(
    {
        "invalid_grant",
        "invalid_client",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
        "invalid_request",
    }
)
"""The errors that the standard defines: the endpoint will say the same again."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a refresh needs."""

    refresh_token: str = field(repr=False)
    client_id: str


@dataclass(frozen=True, slots=True)
class Grant:
    """What came of it."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    """A new one, if the old one is spent."""
    expires_in: float | None = None
    """Seconds; None: not known."""


class Refused(Exception):
    """The endpoint said no, and will say so again."""

    def __init__(self, reason: str) -> None:
        """`reason` is one of the standard's error codes."""
        self.reason = reason
        super().__init__(reason)


class TokenEndpoint(Protocol):
    """Where tokens are refreshed."""

    async def refresh(self, request: TokenRequest) -> Grant:
        """A new access token. Raises Refused, or UpstreamUnavailable when there was no usable answer."""
        ...


class HttpTokenEndpoint:
    """A token endpoint over HTTP. The address is the operator's choice, never a tenant's."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        timeout: float = 20.0,
    ) -> None:
        """Takes JSON, as Anthropic's does (the standard has a form)."""
        self._session = session
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def refresh(self, request: TokenRequest) -> Grant:
        fields = {
            "grant_type": "refresh_token",
            "refresh_token": request.refresh_token,
            "client_id": request.client_id,
        }
        try:
            async with self._session.post(
                self._url,
                json=fields,
                timeout=self._timeout,
                allow_redirects=False,
                headers={"accept": "application/json"},
            ) as answer:
                return _read(answer.status, await _content(answer))
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
            # Not the error's text: it may quote what was sent.
            raise UpstreamUnavailable(f"the token endpoint cannot be reached: {type(error).__name__}") from None


async def _content(answer: aiohttp.ClientResponse) -> bytes:
    content = await answer.content.read(MAX_ANSWER)
    while len(content) < MAX_ANSWER and (more := await answer.content.read(MAX_ANSWER - len(content))):
        content += more
    return content


def _read(status: int, content: bytes) -> Grant:
    try:
        decoded = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        decoded = None
    answer: dict[str, Any] = decoded if isinstance(decoded, dict) else {}
    error = answer.get("error")
    if 400 <= status < 500 and isinstance(error, str) and error in _REASONS:
        raise Refused(error)
    access, refresh, ends = answer.get("access_token"), answer.get("refresh_token"), answer.get("expires_in")
    if status != 200 or not isinstance(access, str) or not access:
        raise UpstreamUnavailable(f"the token endpoint answered {status} without a token")
    return Grant(
        access,
        refresh if isinstance(refresh, str) and refresh else None,
        float(ends) if isinstance(ends, int | float) and not isinstance(ends, bool) and ends > 0 else None,
    )
