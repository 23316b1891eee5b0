"""What an agent does to the places that the server fills and empties is told, and ends no turn."""

from __future__ import annotations

import pytest
from anthropic import AsyncAnthropic

from managed.driving import texts, turn
from managed.workspaces import bash, errors, session_of

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_names_and_notes_that_cannot_be_kept_are_told_and_the_session_goes_on(client: AsyncAnthropic) -> None:
    api = client.beta
    store = await api.memory_stores.create(name="Notes")
    session = await session_of(client, resources=[{"type": "memory_store", "memory_store_id": store.id}])
    bad = "$(printf 'bad\\377')"
    script = (
        f"mkdir -p .mnt/session/outputs; echo x > .mnt/session/outputs/{bad}; echo x > .mnt/session/outputs/good; "
        f"echo x > .mnt/memory/notes/{bad}; echo x > .mnt/memory/notes/good"
    )
    for _ in range(2):  # what was kept once is not kept again
        told = dict(errors(await turn(client, session.id, bash(script))))
        assert "bad\ufffd was not kept" in told["output_error"], told
        assert "/bad\ufffd: is not kept" in told["memory_sync_error"], told
        script = "true"
    assert [one.filename async for one in api.files.list(scope_id=session.id)] == ["good"]
    assert [one.path async for one in api.memory_stores.memories.list(store.id)] == ["/good"]

    forged = (
        'rm -rf .mnt/session/outputs/* .mnt/memory/notes/b*; echo \'{"skills":{"..":"x"}}\' > .mnt/.server/content.json'
    )
    await turn(client, session.id, bash(forged))
    for command in ("rm -rf .mnt && ln -s /tmp .mnt && echo linked", "echo still here"):
        said = texts(await turn(client, session.id, bash(command)))
        assert said[-1].removeprefix("Tool said: ") in {"linked", "still here"}, said
