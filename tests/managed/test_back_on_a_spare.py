"""A hibernated session with files comes back on a spare that waits, where nothing is lost by telling it the past."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.snapshots import rows
from managed.driving import history, message, new_session, texts, turn
from managed.test_elsewhere import errors, held, printed, resumed, sdk, shared, shell, until
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TOOLS = [{"type": "agent_toolset_20260401", "default_config": {"permission_policy": {"type": "always_allow"}}}]
LEVELS = pytest.mark.parametrize("level", [level.value for level in Level])


def settings(root: Path, level: str, **more: Any) -> dict[str, Any]:
    if Level(level) in probe().unavailable:
        pytest.skip(f"this host has no {level}")
    return shared(root, sandbox=level, spares=0, agent_spares=1, max_processes=4, **more)


async def spare_waits(server: Running) -> None:
    await until(lambda: server.server.pool.stats().spares["agent"] >= 2)  # of Messages callers, and of sessions


async def hibernated(server: Running, session: str) -> None:
    """The session has no process any more, its files are kept, and a spare waits."""
    await server.server.pool.end_session(session, hibernate=True)
    conversation = held(server, session)
    await until(lambda: conversation.resume is not None and conversation.resume.ready.is_set())
    await spare_waits(server)


def on(server: Running, session: str) -> SlotProcess:
    process = held(server, session).process
    assert process is not None
    return process


def transcripts(process: SlotProcess) -> list[str]:
    return sorted(path.stem for path in process.dirs.home.glob(".claude/projects/*/*.jsonl"))


async def recalled(client: AsyncAnthropic, session: str) -> str:
    return texts(await turn(client, session, message("[[recall]]")))[-1]


@LEVELS
async def test_a_hibernated_session_goes_on_on_a_spare(reachable_tmp_path: Path, level: str) -> None:
    root = reachable_tmp_path
    async with running(root / "one", **settings(root, level)) as server, sdk(server) as client:
        await spare_waits(server)
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo plum > file; chmod 640 file; mkdir deep; echo fig > deep/er"))
        await turn(client, session, message('[[tool Read {"file_path":"/work/file"}]] [[then]]'))
        before = on(server, session)
        await hibernated(server, session)
        await until(lambda: not before.dirs.root.exists())
        said = await turn(client, session, shell("cat file deep/er; stat -c %a file; pwd; echo more >> deep/er"))
        assert "plum\nfig\n640" in printed(said)
        process = on(server, session)
        assert server.server.pool.stats().claims["spare"] == 2
        assert process.adopted is not None
        assert not process.resumes
        assert "echo plum" in await recalled(client, session)
        assert transcripts(process) == [process.agent.session_uuid], "the one before is not needed any more"
        assert list((root / "one/data/kept").glob("*")) == []
        # What it writes is what the next process resumes from, here and elsewhere.
        conversation, keeper = held(server, session), server.server.keeper
        await keeper.make_durable(conversation)
        row = await rows.current(keeper._books.db, conversation.owner.org, session)
        assert row is not None
        assert row.cli_uuid == process.agent.session_uuid
        await turn(client, session, message('[[tool Bash {"command":"sleep 60","run_in_background":true}]] [[then]]'))
        await hibernated(server, session)
        await turn(client, session, message("good morning"))
        assert resumed(server, session), "the CLI tells the model what became of a command in the background"
        assert "echo plum" in await recalled(client, session)
    async with running(root / "two", **settings(root, level) | {"agent_spares": 0}) as server, sdk(server) as client:
        assert "fig\nmore" in printed(await turn(client, session, shell("cat deep/er")))
        assert resumed(server, session), "no spare waits, and the transcript is exact"
        assert "echo plum" in await recalled(client, session)
        assert errors(await history(client, session)) == []


async def test_a_spare_knows_which_files_the_conversation_has_read(reachable_tmp_path: Path) -> None:
    root = reachable_tmp_path
    read = message('[[tool Read {"file_path":"/work/file"}]] [[then]]')
    async with running(root / "one", **settings(root, "bwrap")) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo plum > file"))
        await turn(client, session, read)
        await hibernated(server, session)
        await turn(client, session, shell("echo fig >> file"))
        assert not resumed(server, session)
        assert "changed on disk since you last read it" in json.dumps(server.upstream.requests[-1].body["messages"])
        # That the model was shown the change is no message of the conversation: it is in the CLI's transcript alone.
        await hibernated(server, session)
        await turn(client, session, message("good morning"))
        assert resumed(server, session)
        assert "changed on disk since you last read it" in json.dumps(server.upstream.requests[-1].body["messages"])


@LEVELS
async def test_a_session_from_another_server_goes_on_on_a_spare(reachable_tmp_path: Path, level: str) -> None:
    root = reachable_tmp_path
    async with running(root / "one", **settings(root, level)) as server, sdk(server) as client:
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo plum > file"))
    async with running(root / "two", **settings(root, level)) as server, sdk(server) as client:
        await spare_waits(server)
        assert "plum" in printed(await turn(client, session, shell("cat file")))
        assert server.server.pool.stats().claims["spare"] == 1
        assert "echo plum" in await recalled(client, session)
        assert errors(await history(client, session)) == []


async def test_whoever_hangs_up_while_a_process_is_started_leaves_the_files_to_the_next(
    reachable_tmp_path: Path,
) -> None:
    root = reachable_tmp_path
    async with (
        running(root / "one", **settings(root, "none") | {"agent_spares": 0}) as server,
        sdk(server) as client,
    ):
        session = (await new_session(client, tools=TOOLS)).id
        await turn(client, session, shell("echo plum > file"))
        await server.server.pool.end_session(session, hibernate=True)
        conversation = held(server, session)
        await until(lambda: conversation.resume is not None and conversation.resume.ready.is_set())
        resume = conversation.resume
        assert resume is not None
        event: Any = message("never answered")
        await client.beta.sessions.events.send(session, events=[event])
        await until(lambda: not resume.ready.is_set())  # they are with the process that is being started
        await client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])
        await conversation.settled()
        assert "plum" in printed(await turn(client, session, shell("cat file")))
