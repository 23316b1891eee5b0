"""What the real CLI prints merges into what the upstream said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from claude_wrapper.testing import ScriptedUpstream
from claude_wrapper.wire.history import history_key
from claude_wrapper.wire.merge import CONTINUED_BY_CLI, MessageMerger
from claude_wrapper.wire.messages import Message
from claude_wrapper.wire.streamjson import decode_frame, user_line

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

FLAGS = "-p --input-format stream-json --output-format stream-json --verbose --include-partial-messages"
MODEL = "claude-sonnet-5-5"


class Cli:
    """A bare process on pipes, only as much as this test needs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def turn(self, prompt: str, merger: MessageMerger) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(user_line(prompt))
        out = b""
        while True:
            frame = decode_frame((await self.process.stdout.readline()).rstrip(b"\n"))
            out += b"".join(merger.feed(frame))
            if frame.type == "result":
                return out


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def cli(real_cli: Path, tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Cli]:
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": "x"}
    env |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_MAX_RETRIES": "0"}
    process = await asyncio.create_subprocess_exec(
        real_cli, *FLAGS.split(), "--bare", "--tools", "", "--setting-sources", "", "--model", MODEL,
        stdin=-1, stdout=-1, stderr=asyncio.subprocess.DEVNULL, cwd=tmp_path, env=env, limit=2**24,
    )  # fmt: skip
    async with asyncio.timeout(60):
        yield Cli(process)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def test_turns_of_one_process_merge_into_the_messages_that_upstream_sent(
    cli: Cli, upstream: ScriptedUpstream
) -> None:
    expected = {
        "hello": "You said: hello",
        "/clear": "You said: /clear",
        '[[say "{\\"type\\":\\"error\\"}"]]': '{"type":"error"}',
        "[[think hm]] [[say x]]": "x",
        "[[cut 2]] a b c": "You said: a b c",
    }
    history = []
    for number, (prompt, answer) in enumerate(expected.items()):
        merger = MessageMerger(f"msg_{number}", "m")
        out = await cli.turn(prompt, merger)
        content = merger.message()["content"]
        assert "".join(block.get("text", "") for block in content) == answer
        assert out.count(b"event: message_start\n") == out.count(b"event: message_stop\n") == 1
        assert merger.model == MODEL
        history += [Message("user", prompt), Message("assistant", content)]
    # The conversation that we hash is the one that the process holds.
    merger = MessageMerger("msg_last", "m")
    await cli.turn("[[history]]", merger)
    held = json.loads(merger.message()["content"][0]["text"])
    assert held["digest"] == history_key([*history, Message("user", "[[history]]")])


async def test_failures_and_early_stops_are_told_apart(cli: Cli, upstream: ScriptedUpstream) -> None:
    merger = MessageMerger("msg_1", "m")
    assert await cli.turn("[[error 429]]", merger) == b""
    assert merger.failure is not None
    assert (merger.failure.status, merger.failure.type) == (429, "rate_limit_error")
    for reason in sorted(CONTINUED_BY_CLI):
        merger = MessageMerger("msg_2", "m", end_at=CONTINUED_BY_CLI)
        await cli.turn(f"[[stop {reason}]] {reason}", merger)
        assert merger.message()["content"] == [{"type": "text", "text": f"You said: {reason}"}]
        assert merger.message()["stop_reason"] == reason
