"""A second, equal request when the first one is slow: for reads that change nothing and cost nothing. Off by default.

Only before the first byte, only for requests that are not streamed (token counts, model lists), and only while the
retry budget of the upstream allows one more. The slower one is cut off as soon as the other has an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from claude_wrapper.clock import Clock

T = TypeVar("T")


async def first_of(
    ask: Callable[[], Awaitable[T]],
    *,
    after: float,
    clock: Clock,
    good: Callable[[T], bool],
    allowed: Callable[[], bool],
    discard: Callable[[T], None],
) -> T:
    """The answer of `ask`; when it takes longer than `after` seconds and `allowed` says so, of the faster of two.

    An answer that is not `good` waits for the other one. `discard` gets an answer that is not needed. What `ask` raises
    is raised when no answer came of either.
    """
    running: list[asyncio.Future[T]] = [asyncio.ensure_future(ask())]
    waited = asyncio.ensure_future(clock.sleep(after))
    try:
        either: set[asyncio.Future[Any]] = {*running, waited}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not running[0].done() and allowed():
            running.append(asyncio.ensure_future(ask()))
        chosen = await _first_good(running, good)
        running.remove(chosen)
        return chosen.result()
    finally:
        waited.cancel()
        for one in running:
            one.cancel()
        for left in await asyncio.gather(*running, return_exceptions=True):
            if not isinstance(left, BaseException):
                discard(left)


async def _first_good(running: Sequence[asyncio.Future[T]], good: Callable[[T], bool]) -> asyncio.Future[T]:
    """Who is first with a good answer; if nobody has one, an answer rather than an error, the earlier asked first."""
    left = set(running)
    while left:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            if one.exception() is None and good(one.result()):
                return one
    return next((one for one in running if one.exception() is None), running[0])
