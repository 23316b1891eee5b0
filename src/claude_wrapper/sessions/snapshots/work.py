"""Blocking and parallel work of snapshots: threads that are waited for, bounded blob calls, bounded parallelism."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from claude_wrapper.errors import StorageUnavailable

T = TypeVar("T")
P = ParamSpec("P")


async def in_thread(work: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
    """Run blocking work in a thread. Cancelled, it still waits for the end: what the thread writes may be removed then.

    So give it little at a time.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kw))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def within(seconds: float, what: str, call: Awaitable[T]) -> T:
    """The result of a blob call; StorageUnavailable when the store does not answer in time."""
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError as error:
        raise StorageUnavailable(f"the blob store did not {what} within {seconds:g} s") from error


async def each(items: Iterable[T], parallel: int, work: Callable[[T], Awaitable[None]]) -> None:
    """Do `work` for all items, so many at once; items are taken only when they are begun.

    The first failure ends the others and is raised.
    """
    waiting = iter(items)
    with _first_failure():
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(_drain(waiting, work))


async def _drain(waiting: Iterator[T], work: Callable[[T], Awaitable[None]]) -> None:
    for item in waiting:
        await work(item)


@contextmanager
def _first_failure() -> Iterator[None]:
    try:
        yield
    except BaseExceptionGroup as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from group
