"""What could not be written down is not lost: it is given back in order, and written before the end of the turn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sessions.writebehind import Entry, WriteBehind
from claude_wrapper.wire.managed import Output

pytestmark = pytest.mark.anyio


def said(number: int) -> Output:
    return Output(events=[{"type": "agent.message", "id": f"sevt_{number}"}])


async def test_what_a_store_that_was_away_did_not_take_comes_back_in_order() -> None:
    written: list[str] = []
    away = True

    async def show(outputs: Sequence[Output]) -> None:
        del outputs

    async def commit(entries: Sequence[Entry]) -> None:
        if away:
            raise StorageUnavailable("the database is away")
        written.extend(str(event["id"]) for output, _ in entries for event in output.events)

    behind = WriteBehind(show, commit, name="test")
    behind.put(said(1), None)
    behind.put(said(2), None)
    await behind.caught_up()
    assert isinstance(behind.failed, StorageUnavailable)
    behind.put(said(3), None)
    left = await behind.stop()
    assert [event["id"] for output, _ in left for event in output.events] == ["sevt_1", "sevt_2", "sevt_3"]

    await behind.write(left)
    assert isinstance(behind.failed, StorageUnavailable), "still away: whoever asks must not write an end"
    away = False
    await behind.write(await behind.stop())
    assert behind.failed is None
    assert written == ["sevt_1", "sevt_2", "sevt_3"]
