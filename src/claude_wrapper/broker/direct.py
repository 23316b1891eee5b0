"""Calls that the server itself makes upstream for a caller: model lists and token counts. No process is involved."""

from __future__ import annotations

from dataclasses import dataclass, field

from claude_wrapper.broker.calls import Credential
from claude_wrapper.broker.inject import upstream_headers
from claude_wrapper.broker.upstream import Ask, Upstream, UpstreamFailure
from claude_wrapper.errors import UpstreamUnavailable

_MOST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """An upstream's whole answer."""

    status: int
    body: bytes = field(repr=False)


class Direct:
    """A client of its own: a slow model list must not share connections with running turns."""

    def __init__(self, *, connect_seconds: float, read_seconds: float) -> None:
        self._upstream = Upstream(connect_seconds, read_seconds)

    async def start(self) -> None:
        await self._upstream.start()

    async def close(self) -> None:
        await self._upstream.close()

    async def ask(
        self, credential: Credential, method: str, path: str, body: bytes | None = None, *, version: str = "2023-06-01"
    ) -> DirectAnswer:
        """Ask `credential`'s upstream for `path` (with its query). Raises UpstreamUnavailable without an answer."""
        headers = [("anthropic-version", version), ("content-type", "application/json"), ("accept", "application/json")]
        ask = Ask(method, credential.base_url.rstrip("/") + path, upstream_headers(headers, credential), body)
        try:
            answer = await self._upstream.ask(ask)
            try:
                return DirectAnswer(answer.status, await answer.read_all(_MOST_BYTES))
            finally:
                answer.close()
        except UpstreamFailure as error:
            raise UpstreamUnavailable(error.message, retry_after=1) from error
