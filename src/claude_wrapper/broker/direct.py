"""Calls that the server itself makes upstream for a caller: model lists and token counts. No process is involved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from claude_wrapper.broker import policy
from claude_wrapper.broker.calls import CacheUse, Credential
from claude_wrapper.broker.hedge import first_of
from claude_wrapper.broker.inject import upstream_headers
from claude_wrapper.broker.keeping import Caching, Keeping, Kept, pack, unpack
from claude_wrapper.broker.refusals import Refused
from claude_wrapper.broker.retry import RetryBudget
from claude_wrapper.broker.upstream import Ask, Upstream, UpstreamFailure
from claude_wrapper.clock import Clock, SystemClock
from claude_wrapper.errors import UpstreamUnavailable
from claude_wrapper.storage.cache import Computed

_MOST_BYTES = 16 * 2**20
_HEDGE_SHARE = 0.2
_HEDGE_RESERVE = 10.0
"""Second requests as a share of reads, and how many there may be before the share counts."""


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """An upstream's whole answer."""

    status: int
    body: bytes = field(repr=False)
    cache: str | None = None
    """`hit` or `miss`; None: no cache was asked."""


class _NotKept(Exception):
    """The answer is given and not kept."""


class Direct:
    """A client of its own: a slow model list must not share connections with running turns."""

    def __init__(
        self,
        *,
        connect_seconds: float,
        read_seconds: float,
        caching: Caching | None = None,
        hedge_seconds: float = 0.0,
        clock: Clock | None = None,
        on_hedge: Callable[[], None] = lambda: None,
    ) -> None:
        """`hedge_seconds`: a read that takes longer is asked a second time, at most for a fifth of them; 0: never."""
        self._hedge_seconds, self._clock, self._on_hedge = hedge_seconds, clock or SystemClock(), on_hedge
        self._hedges = RetryBudget(_HEDGE_SHARE, _HEDGE_RESERVE)
        self._caching = caching
        self._upstream = Upstream(connect_seconds, read_seconds)

    async def start(self) -> None:
        await self._upstream.start()

    async def close(self) -> None:
        await self._upstream.close()

    async def ask(
        self,
        credential: Credential,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        org: str,
        use: CacheUse | None = None,
        version: str = "2023-06-01",
    ) -> DirectAnswer:
        """Ask `credential`'s upstream for `path` (with its query), or give what `org` was answered a while ago.

        Raises UpstreamUnavailable without an answer.
        """
        place = None if use is CacheUse.BYPASS else self._place(credential, method, path, body, version)
        if place is None:
            return await self._ask(credential, method, path, body, version)
        answer: DirectAnswer | None = None

        async def compute() -> Computed:
            nonlocal answer
            answer = await self._ask(credential, method, path, body, version)
            if answer.status != 200:
                raise _NotKept
            return Computed(pack(Kept("application/json", answer.body)))

        try:
            found = await place.cache.get_or_compute(
                org, place.key, place.seconds, compute, refresh=use is CacheUse.REFRESH
            )
        except (_NotKept, UpstreamUnavailable):
            if answer is None:  # of somebody else who asked the same at the same time
                return await self._ask(credential, method, path, body, version)
            return answer
        kept = unpack(found.value)
        if answer is not None or kept is None:
            return replace(answer or await self._ask(credential, method, path, body, version), cache="miss")
        return DirectAnswer(200, kept.body, "hit")

    def _place(
        self, credential: Credential, method: str, path: str, body: bytes | None, version: str
    ) -> Keeping | None:
        if self._caching is None:
            return None
        try:
            route = policy.decide(method, path)
        except Refused:
            return None  # a query that could be read in two ways: the upstream says what it thinks of it
        return self._caching.of(route, credential, [("anthropic-version", version)], body, use=None, main=True)

    async def _ask(
        self, credential: Credential, method: str, path: str, body: bytes | None, version: str
    ) -> DirectAnswer:
        async def once() -> DirectAnswer:
            return await self._once(credential, method, path, body, version)

        if not self._hedge_seconds:
            return await once()
        self._hedges.called()

        def allowed() -> bool:
            if not self._hedges.spend():
                return False
            self._on_hedge()
            return True

        return await first_of(
            once,
            after=self._hedge_seconds,
            clock=self._clock,
            good=lambda answer: answer.status == 200,
            allowed=allowed,
            discard=lambda answer: None,
        )

    async def _once(
        self, credential: Credential, method: str, path: str, body: bytes | None, version: str
    ) -> DirectAnswer:
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
