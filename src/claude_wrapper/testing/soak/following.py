"""A client of a session's event stream that is cut off, and comes back with the last number that it saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import aiohttp
import msgspec

from claude_wrapper.testing.soak import outcomes, plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.outcomes import Followed
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.wire.sse import SSEDecoder

_SILENCE_SECONDS: Final = 40.0
"""The server says something every 15 seconds; a connection that is silent for longer is dead."""
_PAUSE_SECONDS: Final = 0.2


class Follower:
    """Follows one session until it is closed. `cuts`: after so many further events it hangs up by itself."""

    def __init__(self, asker: Asker, session: str, record: Record, cuts: Sequence[int] = ()) -> None:
        self.events: list[dict[str, Any]] = []
        self.seen: list[tuple[int, str]] = []
        self.unclear: list[str] = []
        """Answers to a connection that were neither a stream nor a clear error."""
        self._asker = asker
        self._session = session
        self._record = record
        self._cuts: Iterator[int] = iter(cuts)
        self._changed = asyncio.Event()
        self._connections = 0
        self._task = asyncio.get_running_loop().create_task(self._follow(), name=f"follow {session}")

    async def changed(self, seconds: float) -> None:
        """Return when an event has come, or after `seconds`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """Stop following. Raises what the following failed with: that would be a fault of this program."""
        self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            return

    def followed(self, *, to_the_end: bool, caught_up: bool) -> Followed:
        """What it got."""
        return Followed(self._session, tuple(self.seen), self._connections, to_the_end, caught_up)

    async def _follow(self) -> None:
        while True:
            await self._asker.up.wait()
            try:
                await self._connect()
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                pass  # cut off: the next connection goes on where this one ended
            except (ValueError, KeyError, TypeError) as error:
                self.unclear.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _connect(self) -> None:
        fleet = self._asker.fleet
        replica, began = fleet.choose(), time.monotonic()
        try:
            await self._read(replica.url)
        except (aiohttp.ClientError, ConnectionError) as error:
            if not isinstance(error, aiohttp.ServerTimeoutError):
                fleet.lost(replica, began, f"stream of {self._session}: {type(error).__name__}")
            raise

    async def _read(self, base: str) -> None:
        asker = self._asker
        headers = {"x-api-key": asker.key, "last-event-id": str(self.seen[-1][0] if self.seen else 0)}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_SECONDS)
        url = f"{base}/v1/sessions/{self._session}/events/stream"
        async with asker.http.get(url, headers=headers, timeout=limits) as response:
            if response.status != 200:
                if response.status not in outcomes.CLEAR:
                    self.unclear.append(f"{response.status}: {(await response.text())[:200]}")
                return
            self._connections += 1
            left = next(self._cuts, None)
            decoder = SSEDecoder()
            async for chunk in response.content.iter_any():
                for event in decoder.feed(chunk):
                    if event.id is None or not event.id:
                        continue
                    body = msgspec.json.decode(event.data)
                    self.seen.append((int(event.id), str(body["id"])))
                    self.events.append(body)
                    self._changed.set()
                    if left is not None:
                        left -= 1
                        if left <= 0:
                            self._record.fault(plan.STREAM_FAULT)
                            response.close()
                            return
