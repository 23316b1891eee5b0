"""The real Claude CLI against the scripted upstream: what really goes over the wire."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from agent.bare import cli_launch, running, slot_dirs
from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.launch import AGENT, CHAT, CHAT_OAUTH, LaunchProfile, transcript_path
from claude_wrapper.agent.lifecycle import State
from claude_wrapper.ids import RandomIds
from claude_wrapper.testing import ScriptedUpstream
from claude_wrapper.wire.control import ControlRefused
from claude_wrapper.wire.streamjson import Frame

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

LONG = "[[tokens 400]] [[delay 20]]"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

Start = Callable[..., AbstractAsyncContextManager[tuple[Agent, ScriptedUpstream]]]


@pytest.fixture
def cli(real_cli: Path, tmp_path: Path, leaves_nothing: None) -> Start:
    dirs = slot_dirs(tmp_path)

    @asynccontextmanager
    async def start(profile: LaunchProfile = CHAT, **how: Any) -> AsyncIterator[tuple[Agent, ScriptedUpstream]]:
        async with (
            asyncio.timeout(40),
            ScriptedUpstream() as upstream,
            running(cli_launch(real_cli, dirs, upstream.url, profile, **how), dirs) as agent,
        ):
            yield agent, upstream

    return start


async def ask(agent: Agent, content: Any, **how: Any) -> list[Frame]:
    async with agent.turn(content, **how) as turn:
        return [frame async for frame in turn]


async def said(agent: Agent, content: Any, **how: Any) -> str:
    return str((await ask(agent, content, **how))[-1].json()["result"])


def sent(upstream: ScriptedUpstream) -> dict[str, Any]:
    """The latest request body, without what differs by request."""
    body = copy.deepcopy(upstream.requests[-1].body)
    body.pop("metadata", None)
    for message in body["messages"]:
        for block in message["content"] if isinstance(message["content"], list) else []:
            block.pop("cache_control", None)
    for block in body["system"]:
        block["text"] = block["text"].split("cc_version")[0]
    return body


def conversation(upstream: ScriptedUpstream) -> list[tuple[str, Any]]:
    """Roles and contents that the model was asked with; the CLI's own `system` rows left out, texts as blocks."""
    found = []
    for message in sent(upstream)["messages"]:
        content = message["content"]
        if message["role"] != "system":
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            found.append((message["role"], blocks))
    return found


async def test_a_turn_streams_its_own_frames_and_ends_with_its_result(cli: Start) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["You are a test."])
        assert agent.state is State.READY
        frames = await ask(agent, "hello there")
        assert frames[-1].json()["result"] == "You said: hello there"
        assert {"system", "stream_event", "assistant", "result"} == {frame.type for frame in frames}
        assert all(frame.event is not None for frame in frames if frame.type == "stream_event")
        assert agent.session_uuid == frames[-1].session_id
        assert sent(upstream)["system"][-1]["text"] == "You are a test."
        assert agent.garbage == 0


@pytest.mark.parametrize("text", ["--help", "-p", "/clear", "/cost", "@/etc/passwd", "!ls", "#x", " \n a  \n", "{}"])
async def test_a_text_that_looks_like_something_else_is_only_a_text(cli: Start, text: str) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await ask(agent, "first")
        await ask(agent, text)
        assert conversation(upstream)[-1] == ("user", [{"type": "text", "text": text}])
        assert len(conversation(upstream)) == 3


async def test_eight_turns_at_once_are_answered_in_order(cli: Start) -> None:
    async with cli() as (agent, _upstream):
        await agent.initialize(system_prompt=["x"])
        answers = await asyncio.gather(*(said(agent, f"number {n}") for n in range(8)))
        assert answers == [f"You said: number {n}" for n in range(8)]


async def test_an_interrupted_turn_still_ends_with_its_result_and_the_process_goes_on(cli: Start) -> None:
    async with cli() as (agent, _upstream):
        await agent.initialize(system_prompt=["x"])
        async with agent.turn(LONG) as turn:
            async for frame in turn:
                if frame.type == "stream_event":
                    await turn.interrupt()
        assert turn.result is not None
        assert turn.result.json()["terminal_reason"] == "aborted_streaming"
        assert await said(agent, "next") == "You said: next"


@pytest.mark.parametrize("after", [0, 1, 3, 6])
async def test_the_turn_after_an_abandoned_one_gets_its_own_answer(cli: Start, after: int) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        for _ in range(3):
            async with agent.turn(LONG) as turn:
                for _ in range(after):
                    await anext(turn)
            assert await said(agent, "next") == "You said: next"
        async with asyncio.timeout(1):  # nobody pays for what nobody reads
            for request in upstream.requests:
                await request.wait_done()


async def test_a_caller_cancelled_while_waiting_for_a_frame_leaves_the_process_fit(cli: Start) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        task = asyncio.create_task(ask(agent, "[[hang]]"))
        while not upstream.active:
            await asyncio.sleep(0.01)
        task.cancel()
        assert await said(agent, "next") == "You said: next"


Step = Callable[[Agent], Awaitable[Any]]


async def leave(agent: Agent) -> None:
    async with agent.turn("SECRET " + LONG) as turn:
        async for frame in turn:
            if frame.type == "stream_event":
                break


async def leave_at_once(agent: Agent) -> None:
    async with agent.turn("SECRET " + LONG):
        pass


PAST = [
    {"role": "user", "content": "SECRET past"},
    {"role": "assistant", "content": "SECRET answer"},
]

EARLIER: dict[str, list[Step]] = {
    "one turn": [lambda agent: ask(agent, "SECRET")],
    "several turns": [lambda agent, n=n: ask(agent, f"SECRET {n}") for n in range(4)],
    "interrupted last": [lambda agent: ask(agent, "SECRET"), leave],
    "interrupted first": [leave, lambda agent: ask(agent, "SECRET")],
    "abandoned at once": [leave_at_once, lambda agent: ask(agent, "SECRET"), leave_at_once],
    "failed": [lambda agent: ask(agent, "SECRET [[error 529]]"), lambda agent: ask(agent, "SECRET")],
    "injected": [lambda agent: agent.inject(PAST, model="claude-sonnet-5-5")],
    "injected and continued": [
        lambda agent: agent.inject(PAST, model="claude-sonnet-5-5"),
        lambda agent: ask(agent, "SECRET"),
        leave,
    ],
}


@pytest.mark.parametrize("profile", [CHAT, CHAT_OAUTH], ids=["bare", "oauth"])
async def test_after_a_rewind_nothing_of_the_earlier_conversation_is_sent(cli: Start, profile: LaunchProfile) -> None:
    async with cli(profile) as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await ask(agent, "fresh")
        virgin = sent(upstream)
        await agent.rewind()
        await agent.prime(RandomIds().uuid())
        await ask(agent, "fresh")
        assert sent(upstream) == virgin, "primed"
        await agent.rewind()
        for name, steps in EARLIER.items():
            for step in steps:
                await step(agent)
            await agent.rewind()
            await ask(agent, "fresh")
            assert sent(upstream) == virgin, name
            await agent.rewind()


async def test_file_tools_leave_no_trace_in_a_rewound_agent_and_a_shell_forbids_the_rewind(cli: Start) -> None:
    async def allow(_subtype: str, request: dict[str, Any]) -> dict[str, Any]:
        return {"behavior": "allow", "updatedInput": request["input"]}

    async with cli(AGENT) as (agent, upstream):
        agent.on_control = allow
        await agent.initialize()
        await ask(agent, "fresh", as_written=False)
        virgin = sent(upstream)
        await agent.rewind()
        work = next(frame for frame in await ask(agent, "where") if frame.subtype == "init").json()["cwd"]
        path = f"{work}/notes.txt"
        for name, arguments in [
            ("Write", {"file_path": path, "content": "SECRET one"}),
            ("Read", {"file_path": path}),
            ("Edit", {"file_path": path, "old_string": "one", "new_string": "two"}),
        ]:
            answer = await said(agent, f"[[tool {name} {json.dumps(arguments)}]]", as_written=False)
            assert "error" not in answer
        assert Path(path).read_text() == "SECRET two"
        Path(path).write_text("SECRET three")
        await agent.rewind()
        await ask(agent, "fresh", as_written=False)
        assert sent(upstream) == virgin
        shell = json.dumps({"command": "cd /; echo done", "description": "x"})
        assert "done" in await said(agent, f"[[tool Bash {shell}]]")
        with pytest.raises(ControlRefused, match="Bash"):
            await agent.rewind()


async def test_an_injected_past_arrives_in_order_and_unchanged(cli: Start) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    outcome = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]}
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    past: list[dict[str, Any]] = [
        {"role": "user", "content": "/clear is what I say"},
        {"role": "assistant", "content": "answer 0"},
        *({"role": role, "content": f"{role} {n}"} for n in range(1, 12) for role in ("user", "assistant")),
        {"role": "user", "content": "what is the weather"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "let me see"}, call]},
        {"role": "user", "content": [outcome, {"type": "text", "text": "well?"}]},
        {"role": "assistant", "content": "sunny it is"},
        {"role": "user", "content": "two in"},
        {"role": "user", "content": "a row"},
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": [picture, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "a pixel"},
    ]
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await agent.prime(RandomIds().uuid())
        calls = upstream.count
        await agent.inject(past, model="claude-sonnet-5-5")
        assert upstream.count == calls, "the past is not asked"
        await ask(agent, "and now")
        got = conversation(upstream)
    texts = [{"type": "text", "text": "two in"}, {"type": "text", "text": "a row"}]
    expected = [(m["role"], m["content"]) for m in past if m["content"] not in ("two in", "a row")]
    expected.insert(len(expected) - 3, ("user", texts))
    expected.append(("user", "and now"))
    as_blocks = [(r, [{"type": "text", "text": c}] if isinstance(c, str) else c) for r, c in expected]
    *before, with_picture, answer, question = as_blocks
    assert got[: len(before)] == before
    # The CLI keeps a copy of a picture and says where: a block more, and a newline at the text before it.
    image, text, note = got[len(before)][1]
    assert (image, text["text"].rstrip("\n")) == (with_picture[1][0], "what is it")
    assert note["text"].startswith("[Image: source: ")
    assert got[len(before) + 1 :] == [answer, question]


async def test_late_binding_calls_are_obeyed(cli: Start) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await agent.set_model("claude-haiku-4-5")
        await agent.set_permission_mode("acceptEdits")
        await agent.set_max_thinking_tokens(2048)
        await agent.apply_flag_settings({"permissions": {"deny": ["Bash"]}})
        await agent.mcp_set_servers({})
        assert (await agent.mcp_status())["mcpServers"] == []
        frames = await ask(agent, "hello")
        assert sent(upstream)["model"] == "claude-haiku-4-5"
        init = next(frame for frame in frames if frame.subtype == "init").json()
        assert init["permissionMode"] == "acceptEdits"
        with pytest.raises(ControlRefused):
            await agent.call("no_such_thing")


async def test_clear_begins_another_conversation(cli: Start) -> None:
    async with cli() as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await ask(agent, "SECRET")
        before = agent.session_uuid
        await agent.clear()
        await ask(agent, "hello")
        assert agent.session_uuid != before
        assert "SECRET" not in json.dumps(sent(upstream))


async def test_a_session_is_resumed_from_its_transcript(cli: Start, tmp_path: Path) -> None:
    uuid = RandomIds().uuid()
    async with cli(session_uuid=uuid) as (agent, _upstream):
        await agent.initialize(system_prompt=["x"])
        await ask(agent, "remember me")
        assert agent.session_uuid == uuid
        await agent.stop()
    root = tmp_path / "slot"
    assert transcript_path(root / "home", PurePosixPath(root / "work"), uuid).is_file()
    async with cli(resume_uuid=uuid) as (agent, upstream):
        await agent.initialize(system_prompt=["x"])
        await ask(agent, "again")
        texts = [blocks[0]["text"] for _role, blocks in conversation(upstream)]
        assert texts == ["remember me", "You said: remember me", "again"]


async def test_a_cli_killed_in_mid_turn_fails_the_turn(cli: Start) -> None:
    async with cli() as (agent, _upstream):
        await agent.initialize(system_prompt=["x"])
        turn = agent.turn(LONG)
        await anext(turn)
        stopped = await agent.stop(grace=0)
        assert stopped.returncode == -9
        with pytest.raises(Exception, match="stopped before the turn ended"):
            await ask(agent, "next")
