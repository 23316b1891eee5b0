"""What a turn says, written behind: the stream of tokens never waits for the database.

Previews are shown at once. What is to be kept waits a moment for company, so that a short turn costs one transaction
and not five; what somebody acts on (calls, results) does not wait, and nobody who asks for the log is made to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from claude_wrapper.errors import WrapperError
from claude_wrapper.wire.managed import Output

log = structlog.get_logger(__name__)

Entry = tuple[Output, int | None]
"""What a frame gave rise to, and the position of the message in the transcript that it added to."""

LINGER_SECONDS: Final = 0.02
"""How long an event may wait for company."""
_MARKS_LINGER_SECONDS: Final = 0.1
"""The same for marks of model requests, which nobody acts on."""
_BEHIND: Final = 512
"""Entries that may wait for the database; past that the turn waits for it."""


class WriteBehind:
    """The entries of one turn, on their way."""

    def __init__(
        self,
        show: Callable[[Sequence[Output]], Awaitable[None]],
        commit: Callable[[Sequence[Entry]], Awaitable[None]],
        *,
        name: str,
    ) -> None:
        """`show` publishes previews; `commit` writes entries in one transaction. Both are called one at a time."""
        self.failed: WrapperError | None = None
        """Why writing has ended. What could not be written is kept, for `stop` to give back."""
        self._show = show
        self._commit = commit
        self._name = name
        self._waiting: deque[Entry] = deque()
        self._unwritten: list[Entry] = []
        self._since = 0.0
        self._news = asyncio.Event()
        self._hurry = False
        self._stopping = False
        self._writing: asyncio.Task[None] | None = None

    def put(self, output: Output, position: int | None) -> None:
        """Take an entry."""
        self._waiting.append((output, position))
        self._news.set()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name=self._name)

    async def room(self) -> None:
        """Return when not too much waits."""
        if len(self._waiting) > _BEHIND:
            await self.caught_up()

    async def caught_up(self) -> None:
        """Return when everything that was put is committed (or writing failed)."""
        if self._writing is not None and not self._writing.done():
            self._hurry = True
            self._news.set()
            await asyncio.wait({self._writing})

    async def stop(self) -> list[Entry]:
        """Take no more; what is left is the caller's to write, what could not be written before included. Previews have
        been shown, unless writing had failed."""
        self._stopping = True
        self._news.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})
        left = [*self._unwritten, *self._waiting]
        self._unwritten, self.failed = [], None
        self._waiting.clear()
        return left

    async def write(self, left: Sequence[Entry]) -> None:
        """Write what `stop` left; sets `failed` when that fails."""
        self._unwritten, self._hurry = list(left), True
        await self._write()

    async def _write(self) -> None:
        try:
            while self._waiting or self._unwritten:
                self._news.clear()
                await self._take()
                if self._unwritten and (self._hurry or any(_urgent(output) for output, _ in self._unwritten)):
                    await self._write_down()
                elif self._waiting:
                    continue
                elif self._stopping:
                    return
                elif self._unwritten and not await self._news_in_time():
                    await self._write_down()
        except WrapperError as error:
            self.failed = error
        except Exception as error:  # told to the turn, which ends
            log.exception("journal.failed", task=self._name)
            self.failed = WrapperError(f"the turn could not be written down: {type(error).__name__}")
        finally:
            self._hurry = False

    async def _take(self) -> None:
        """Show what is to be shown, in order; what is to be written comes to the rest."""
        shown: list[Output] = []
        while self._waiting:
            output, position = self._waiting.popleft()
            if output.previews:
                if not shown and not all(_mark(entry) for entry in self._unwritten):
                    await self._write_down()  # previews overtake nothing but the marks of model requests
                shown.append(output)
            if output.events or output.results or output.settled or output.threads or position is not None:
                if shown:
                    await self._show(shown)
                    shown = []
                if not self._unwritten:
                    self._since = asyncio.get_running_loop().time()
                self._unwritten.append((output, position))
        if shown:
            await self._show(shown)

    async def _write_down(self) -> None:
        batch, self._unwritten = self._unwritten, []
        try:
            await self._commit(batch)
        except BaseException:
            self._unwritten = [*batch, *self._unwritten]
            raise

    async def _news_in_time(self) -> bool:
        """Wait for company; whether any came."""
        linger = _MARKS_LINGER_SECONDS if all(_mark(entry) for entry in self._unwritten) else LINGER_SECONDS
        try:
            async with asyncio.timeout_at(self._since + linger):
                await self._news.wait()
        except TimeoutError:
            return False
        return True


def _urgent(output: Output) -> bool:
    """Somebody acts on it, or it must not be lost: a call that ran is not run again."""
    return bool(output.calls or output.results or output.threads)


def _mark(entry: Entry) -> bool:
    """Says only that a model request began or ended."""
    output, position = entry
    return position is None and all(str(event["type"]).startswith("span.") for event in output.events)
