"""A session goes on where nothing but the database and the blob store is left of its server."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.app import keeping as keeping_of_app
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.restoring import tell
from claude_wrapper.sessions.snapshots import rows
from managed.driving import history, message, new_session, texts, turn
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TOOLS = [{"type": "agent_toolset_20260401", "default_config": {"permission_policy": {"type": "always_allow"}}}]
SHARED = {"master_key": base64.b64encode(b"k" * 32).decode(), "key_pepper": "p" * 32}


def sdk(server: Running) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)


def shell(command: str) -> dict[str, Any]:
    return message(f'[[tool Bash {{"command":"{command}"}}]] [[then]]')


def shared(root: Path, **more: Any) -> dict[str, Any]:
    """Settings of servers that share a database and a blob store below `root`, and nothing else."""
    both = {"database_url": f"sqlite:///{root / 'shared.db'}", "blob_url": str(root / "blobs")}
    return {"sandbox": "none", "security_level": "permissive", "drain_seconds": 1.0, **both, **SHARED, **more}


def held(server: Running, session: str) -> Conversation:
    conversation = server.server.conversations.find(session)
    assert conversation is not None
    return conversation


def resumed(server: Running, session: str) -> bool:
    """Whether the process that holds the session was started with --resume."""
    process = held(server, session).process
    assert process is not None
    return process.resumes


def printed(events: list[Any]) -> str:
    """What the agent's tools said."""
    results = [event for event in events if event.type == "agent.tool_result"]
    return "".join(block.text for event in results for block in event.content)


def errors(events: list[Any]) -> list[str]:
    return [event.error.message for event in events if event.type == "session.error"]


async def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Processes and files have no event to wait for."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("level", [level.value for level in Level])
async def test_another_server_has_the_files_and_the_conversation(
    reachable_tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Level(level) in probe().unavailable:
        pytest.skip(f"this host has no {level}")
    root = reachable_tmp_path
    async with running(root / "one", **shared(root, sandbox=level)) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        said = await turn(client, session, shell("echo plum > file; chmod 640 file; cat file"))
        assert "plum" in printed(said)
    async with running(root / "two", **shared(root, sandbox=level)) as server, sdk(server) as client:
        said = await turn(client, session, shell("cat file; stat -c %a file; echo fig >> file"))
        assert "plum" in printed(said)
        assert "640" in printed(said)
        assert resumed(server, session)
        assert "echo plum" in texts(await turn(client, session, message("[[recall]]")))[-1]
        assert errors(await history(client, session)) == []
    if level != "none":
        return
    # Another CLI: what it would make of the transcript is nobody's promise, so it is told the history.
    monkeypatch.setattr(keeping_of_app, "version_of", lambda _cli: lambda: "9.9.9")
    async with running(root / "three", **shared(root, sandbox=level)) as server, sdk(server) as client:
        said = await turn(client, session, shell("cat file"))
        assert "fig" in printed(said)
        assert not resumed(server, session)
        recalled = texts(await turn(client, session, message("[[recall]]")))[-1]
        assert "echo plum" in recalled
        assert "echo fig" in recalled
        assert errors(await history(client, session)) == []
        # The session's end is the end of its bytes.
        await client.beta.sessions.delete(session)
        await until(lambda: not [path for path in (root / "blobs").rglob("*") if path.is_file()])


async def test_a_blob_store_that_fails_costs_no_turn_and_a_damaged_snapshot_falls_back(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = reachable_tmp_path
    async with running(root / "one", **shared(root)) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo one > file"))
        keeper, conversation = server.server.keeper, held(server, session)
        org = conversation.owner.org
        await keeper.make_durable(conversation)
        broken = True
        real = keeper._store._blobs.put

        async def put(key: str, content: bytes) -> None:
            if broken:
                raise StorageUnavailable("the blob store could not write: no space left")
            await real(key, content)

        monkeypatch.setattr(keeper._store._blobs, "put", put)
        said = await turn(client, session, shell("echo two > file; cat file"))
        assert "two" in printed(said)
        await until(lambda: keeper.behind == 1 and keeper._sessions[session].told)
        with pytest.raises(StorageUnavailable, match="no space left"):
            await keeper.make_durable(conversation)
        broken = False
        await until(lambda: keeper.behind == 0)  # tried again by itself
        monkeypatch.undo()
        assert [text for text in errors(await history(client, session)) if "not stored yet" in text]
        await turn(client, session, shell("echo three > file"))
        await keeper.make_durable(conversation)
    async with running(root / "two", **shared(root)) as server, sdk(server) as client:
        row = await rows.current(server.server.keeper._books.db, org, session)
        assert row is not None
        manifests = root / "blobs" / "snapshots" / org / session / "manifests"
        (manifests / row.manifest).write_bytes(b"\x01" + b"damaged" * 20)
        said = await turn(client, session, shell("cat file"))
        assert "three" in printed(said), "the one before was taken after the same turn, before the process ended"
        assert [text for text in errors(await history(client, session)) if "is damaged" in text]


async def test_the_log_of_a_session_that_is_over_stays_as_it_is(reachable_tmp_path: Path) -> None:
    """A save that fails while the session is archived has nobody to tell."""
    async with running(reachable_tmp_path, **shared(reachable_tmp_path)) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo hello > file"))
        conversation, books = held(server, session), server.server.sessions.books
        await tell(books, conversation, "told in time")
        await client.beta.sessions.archive(session)
        over = await history(client, session)
        await tell(books, conversation, "too late")
        assert [one.id for one in await history(client, session)] == [one.id for one in over]
        assert sum(one.type == "session.error" for one in over) == 1


async def test_a_hibernated_session_leaves_nothing_here_and_comes_back(reachable_tmp_path: Path) -> None:
    root = reachable_tmp_path
    settings = shared(root, idle_seconds=1.0, sweep_seconds=0.2, kept_seconds=1.0)
    async with running(root / "one", **settings) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo plum > file"))
        await until(lambda: server.server.conversations.find(session) is None)
        await until(lambda: not list((root / "one" / "data" / "kept").glob("*")))
        assert [slot for slot in server.server.pool.stats().slots if slot.session == session] == []
        assert server.server.keeper.behind == 0
        said = await turn(client, session, shell("cat file"))
        assert "plum" in printed(said)
        assert resumed(server, session)
