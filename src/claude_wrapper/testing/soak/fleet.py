"""The replicas of a soak, and what stands before them: a load balancer that asks `/readyz` and turns to another one."""

from __future__ import annotations

import asyncio
import enum
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from claude_wrapper.testing.soak.outcomes import Loss
from claude_wrapper.testing.soak.served import Served

_PROBE_SECONDS: Final = 0.5
_PROBE_PATIENCE_SECONDS: Final = 2.0


class Seen(enum.Enum):
    """What the balancer last saw of a replica."""

    READY = enum.auto()
    UNWELL = enum.auto()
    """It answers, and says that it is not ready: asked only when no other one is."""
    GONE = enum.auto()
    """It does not answer, or drains."""


@dataclass(eq=False)
class Fleet:
    """Requests go to the replicas that are ready, in turn. Where none is, those that answer at all are tried."""

    replicas: tuple[Served, ...]
    losses: list[Loss]
    """Connections that broke are written down here, each with the replica it went to."""
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while a replica answers."""
    repeats: int = 0
    """Requests that were asked again of another replica."""
    _seen: dict[int, Seen] = field(default_factory=dict)
    _turn: itertools.count[int] = field(default_factory=itertools.count)

    def choose(self, *, avoid: Served | None = None) -> Served:
        """Who is asked next; `avoid`: not this one if there is another."""
        for wanted in (Seen.READY, Seen.UNWELL):
            found = [one for one in self.replicas if self._seen.get(one.number) is wanted and one is not avoid]
            if found:
                return found[next(self._turn) % len(found)]
        return avoid or self.replicas[next(self._turn) % len(self.replicas)]

    def another(self, than: Served) -> Served | None:
        """A replica that is ready beside this one."""
        found = self.choose(avoid=than)
        return found if found is not than and self._seen.get(found.number) is Seen.READY else None

    def lost(self, replica: Served, began: float, what: str) -> None:
        """A connection broke: the replica is not asked again until it has answered a probe."""
        self.losses.append(Loss(replica.number, began, time.monotonic(), what))
        self.saw(replica, Seen.GONE)

    async def watch(self, http: aiohttp.ClientSession) -> None:
        """Probe all of them for ever."""
        await asyncio.gather(*(self._probe(http, one) for one in self.replicas))

    async def _probe(self, http: aiohttp.ClientSession, replica: Served) -> None:
        patience = aiohttp.ClientTimeout(total=_PROBE_PATIENCE_SECONDS)
        while True:
            seen = Seen.GONE
            try:
                async with http.get(f"{replica.url}/readyz", timeout=patience) as answer:
                    said = (await answer.json()).get("status")
                    if answer.status == 200:
                        seen = Seen.READY
                    elif said != "draining":
                        seen = Seen.UNWELL
            except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError):
                pass
            self.saw(replica, seen)
            await asyncio.sleep(_PROBE_SECONDS)

    def saw(self, replica: Served, seen: Seen) -> None:
        """What a probe found."""
        self._seen[replica.number] = seen
        if any(one is not Seen.GONE for one in self._seen.values()):
            self.up.set()
        else:
            self.up.clear()


async def start_all(replicas: Sequence[Served]) -> None:
    """Start them side by side. Raises what `Served.start` does."""
    await asyncio.gather(*(one.start() for one in replicas))
