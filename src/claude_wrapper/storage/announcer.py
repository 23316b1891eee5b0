"""From a commit to everybody who caches: first this process, then the other replicas.

`Announcer` is the database's listener. It tells local hearers at once, so that a replica reads its own writes, and
publishes for the others. A replica that loses its subscription tells its hearers to forget everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.engine import Announcement
from claude_wrapper.storage.state.ports import Channels

Hearer = Callable[[bytes | None], None]

_RECONNECT_SECONDS = 1.0
_CLOSE_SECONDS = 5.0


class Announcer:
    """Carries announcements of commits. Register hearers with `on` before `start`."""

    def __init__(self, channels: Channels, clock: Clock) -> None:
        self._channels = channels
        self._clock = clock
        self._hearers: dict[str, list[Hearer]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.undelivered = 0
        """Announcements that other replicas did not get because the shared state was away; their caches' time to live
        is what bounds the harm."""

    def on(self, channel: str, hearer: Hearer) -> None:
        """Call `hearer(payload)` for each announcement on the channel, `hearer(None)` when some may be missing."""
        self._hearers.setdefault(channel, []).append(hearer)

    async def __call__(self, announcements: Sequence[Announcement]) -> None:
        """The database's listener: never raises for a shared state that is away, the commit stands."""
        for announcement in announcements:
            self._tell(announcement.channel, announcement.payload)
        for announcement in announcements:
            try:
                await self._channels.publish(announcement.channel, announcement.payload)
            except StorageUnavailable:
                self.undelivered += 1

    def start(self) -> None:
        """Listen to the other replicas, for every channel that has a hearer."""
        self._tasks = [
            asyncio.create_task(self._follow(channel), name=f"announcements {channel}") for channel in self._hearers
        ]

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)

    async def _follow(self, channel: str) -> None:
        while True:
            try:
                async with self._channels.subscribe(channel) as subscription:
                    self._tell(channel, None)  # whatever was said before we listened
                    async for payload in subscription:
                        self._tell(channel, payload)
            except StorageUnavailable:
                pass
            self._tell(channel, None)
            await self._clock.sleep(_RECONNECT_SECONDS)

    def _tell(self, channel: str, payload: bytes | None) -> None:
        for hearer in self._hearers.get(channel, ()):
            hearer(payload)
