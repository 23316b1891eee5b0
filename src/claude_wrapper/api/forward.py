"""A request for a session that another replica holds is answered by that replica, through this one.

The caller's request goes on as it came, key included: the holder authenticates the caller itself. It is signed with a
secret that replicas share, so that one request is forwarded once at most. Streams pass piece by piece; a caller that
hangs up is hung up on at the holder, too. A holder that does not answer is waited for until its lease is over (or until
it has given the session back); then the session is taken here and the request is served here.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, TypeVar

import aiohttp
import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from claude_wrapper.api import errors, sse
from claude_wrapper.clock import Clock
from claude_wrapper.errors import HeldElsewhere, LeaseLost, StorageUnavailable
from claude_wrapper.sessions.ownership import BEATS, Ownership
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.wire import sse as wire_sse

T = TypeVar("T")

log = structlog.get_logger(__name__)

SIGNED: Final = "cw-forwarded"
"""Request: `seconds.signature`, by the replica that forwards. Answer: that another replica gave it."""
_CONNECT_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.2
_FRESH_SECONDS: Final = 300
"""A signature is good for this long, before and after its time: replicas' clocks differ."""
_MOST_BYTES: Final = 64 * 2**20
_WAIT: Final = frozenset({"draining", "held_elsewhere", "lease_lost"})
"""Errors of a holder that is about to give the session back, or has lost it."""
_NOT_SENT: Final = frozenset(
    {"host", "content-length", "connection", "transfer-encoding", "expect", "accept-encoding", "te", "upgrade", SIGNED}
)
_NOT_ANSWERED: Final = frozenset(
    {"content-length", "connection", "transfer-encoding", "date", "server", "request-id", "x-request-id", "keep-alive"}
)


class HolderGone(Exception):
    """The holder gave no answer and will give none: the session is, or soon will be, free."""


class Forwarder:
    """This replica's way to the others."""

    def __init__(self, own: Ownership, pepper: Pepper, clock: Clock, *, patience_seconds: float) -> None:
        """`patience_seconds`: how long a request may wait for a session that is being given back."""
        self._own = own
        self._pepper = pepper
        self._clock = clock
        self._patience = patience_seconds
        self._client: aiohttp.ClientSession | None = None
        self.forwarded = 0
        """Requests that another replica answered."""

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def answer(self, request: Request, body: bytes, serve: Callable[[], Awaitable[Response]]) -> Response:
        """The answer of `serve`, or of the replica that holds the session when it says HeldElsewhere."""
        until = self._clock.monotonic() + 2 * self._own.lease_seconds + self._patience
        while True:
            try:
                return await serve()
            except HeldElsewhere as elsewhere:
                if self._was_forwarded(request, body):
                    raise  # one hop: the replica that sent it here looks again
                try:
                    return await self._forward(request, body, elsewhere)
                except HolderGone:
                    if self._clock.monotonic() >= until:
                        raise elsewhere from None
            except LeaseLost:
                if self._clock.monotonic() >= until:
                    raise
            await self._clock.sleep(_PAUSE_SECONDS)

    # Who forwarded it ---------------------------------------------------------------------------------------------------

    def _signed(self, at: int, request: Request, body: bytes) -> str:
        return f"{SIGNED}\0{at}\0{request.url.path}\0{hashlib.sha256(body).hexdigest()}"

    def _was_forwarded(self, request: Request, body: bytes) -> bool:
        at, _, signature = request.headers.get(SIGNED, "").partition(".")
        if not (at.isascii() and at.isdigit() and len(at) < 12):
            return False
        try:
            given = bytes.fromhex(signature)
        except ValueError:
            return False
        fresh = abs(self._clock.now().timestamp() - int(at)) <= _FRESH_SECONDS
        return fresh and self._pepper.matches(self._signed(int(at), request, body), given)

    # The way there and back ---------------------------------------------------------------------------------------------

    async def _forward(self, request: Request, body: bytes, to: HeldElsewhere) -> Response:
        if to.address is None:
            raise HeldElsewhere(
                f"{to.message} (that replica cannot be reached: its CLAUDE_WRAPPER_INTERNAL_URL is not set)",
                holder=to.holder,
                address=None,
                retry_after=to.retry_after,
            ) from None
        answer = await self._until_gone(request, self._ask(request, body, to), to.holder)
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in _NOT_ANSWERED}
        headers[SIGNED] = to.holder
        self.forwarded += 1
        if answer.content_type == "text/event-stream":
            return sse.EventStream(self._pieces(answer, to.holder, errors.request_id_of(request)), headers=headers)
        try:
            content = await self._until_gone(request, answer.content.read(_MOST_BYTES), to.holder)
            while not answer.content.at_eof():
                content += await self._until_gone(request, answer.content.read(_MOST_BYTES), to.holder)
        except aiohttp.ClientError as error:
            raise await self._broken(to, error) from error
        finally:
            answer.close()
        if answer.status == 503 and _code(content) in _WAIT:
            raise HolderGone
        return Response(content, status_code=answer.status, headers=headers)

    async def _ask(self, request: Request, body: bytes, to: HeldElsewhere) -> aiohttp.ClientResponse:
        """The head of the holder's answer. Raises HolderGone when the request did not reach it."""
        at = round(self._clock.now().timestamp())
        headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_SENT]
        headers.append((SIGNED, f"{at}.{self._pepper.digest(self._signed(at, request, body)).hex()}"))
        if self._client is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
            connector = aiohttp.TCPConnector(limit=0)
            self._client = aiohttp.ClientSession(
                timeout=timeout, connector=connector, auto_decompress=False, skip_auto_headers=("user-agent",)
            )
        url = f"{str(to.address).rstrip('/')}{request.url.path}"
        try:
            return await self._client.request(request.method, url, data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            log.info("forward.not_reached", replica=to.holder, cause=str(error))
            raise HolderGone from error
        except aiohttp.ClientError as error:
            raise await self._broken(to, error) from error

    async def _broken(self, to: HeldElsewhere, error: Exception) -> Exception:
        """The connection broke after the request was sent: what the holder made of it is known once its lease is over."""
        log.warning("forward.broken", replica=to.holder, cause=str(error) or type(error).__name__)
        until = self._clock.monotonic() + 1.5 * self._own.lease_seconds
        while await self._living(to.holder):
            if self._clock.monotonic() >= until:
                return LeaseLost("the connection to the replica that holds this session broke; send the request again")
            await self._clock.sleep(_PAUSE_SECONDS)
        return HolderGone()

    async def _pieces(self, answer: aiohttp.ClientResponse, holder: str, request_id: str) -> AsyncIterator[bytes]:
        dead = asyncio.ensure_future(self._death(holder))
        try:
            while True:
                piece = asyncio.ensure_future(answer.content.readany())
                try:
                    await asyncio.wait({piece, dead}, return_when=asyncio.FIRST_COMPLETED)
                    if not piece.done():
                        raise aiohttp.ServerDisconnectedError
                    data = piece.result()
                finally:
                    piece.cancel()
                if not data:
                    return
                yield data
        except aiohttp.ClientError:
            lost = LeaseLost("the replica that ran this turn has gone; send the request again", retry_after=1)
            yield wire_sse.encode("error", errors.body(lost, request_id))
        finally:
            dead.cancel()
            answer.close()

    async def _until_gone(self, request: Request, work: Awaitable[T], holder: str) -> T:
        """The result; ClientDisconnect when the caller has gone, HolderGone when the holder has died meanwhile."""
        doing = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(sse.disconnected(request.receive))
        dead = asyncio.ensure_future(self._death(holder))
        try:
            await asyncio.wait({doing, gone, dead}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise ClientDisconnect if gone.done() else HolderGone
        finally:
            for task in (doing, gone, dead):
                task.cancel()
            await asyncio.gather(doing, gone, dead, return_exceptions=True)

    async def _death(self, holder: str) -> None:
        """Return when the holder does not count as alive any more."""
        while True:
            await self._clock.sleep(self._own.lease_seconds / BEATS)
            if not await self._living(holder):
                return

    async def _living(self, holder: str) -> bool:
        try:
            return await self._own.living(holder)
        except StorageUnavailable:
            return True  # nobody can take anything from it now


def _code(content: bytes) -> str:
    try:
        found = msgspec.json.decode(content, type=Mapping[str, object])
        error = found.get("error")
        return str(error.get("code")) if isinstance(error, dict) else ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
