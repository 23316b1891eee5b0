"""What a spare can be told without loss, and how files move into its slot. Without processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from claude_wrapper.agent.launch import AGENT, transcript_path
from claude_wrapper.sandbox.directories import create
from claude_wrapper.sessions import slotfiles
from claude_wrapper.sessions.process import Resume, SlotProcess
from claude_wrapper.sessions.retelling import MAX_MESSAGES, Retelling, files_seen, retelling
from claude_wrapper.sessions.spec import Message

pytestmark = pytest.mark.anyio

UUID = "11111111-2222-4333-8444-555555555555"
AT = "2026-11-27T12:00:00.500Z"
AT_MS = int(datetime(2026, 11, 27, 12, 0, 0, 500_000, tzinfo=UTC).timestamp() * 1000)


def called(name: str, result: Mapping[str, Any] | None = None, **tool_input: Any) -> list[dict[str, Any]]:
    """The lines of one call and its result, as the CLI writes them."""
    use = {"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": tool_input}
    answer = {"type": "tool_result", "tool_use_id": f"toolu_{name}", "content": "done", **(result or {})}
    return [
        {"type": "assistant", "message": {"content": [use]}, "timestamp": AT},
        {"type": "user", "message": {"content": [answer]}, "timestamp": AT, "toolUseResult": {"stdout": ""}},
    ]


def said(text: str = "hello") -> dict[str, Any]:
    return {"type": "user", "message": {"role": "user", "content": text}, "timestamp": AT}


def transcript(*lines: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


PLAIN = [
    said(),
    {"type": "queue-operation"},
    {"type": "attachment", "attachment": {"type": "environment"}},
    *called("Bash", command="ls"),
    *called("mcp__client__get_weather", city="Rome"),
]


def test_a_plain_conversation_is_told_and_its_files_are_known() -> None:
    lines = [*PLAIN, *called("Read", file_path="/work/a"), *called("Edit", file_path="/work/b")]
    assert files_seen(transcript(*lines)) == {"/work/a": AT_MS, "/work/b": AT_MS}
    assert files_seen(transcript(*called("Read", {"is_error": True}, file_path="/work/a"))) == {}


@pytest.mark.parametrize(
    "line",
    [
        {"type": "system", "subtype": "compact_boundary"},
        {"type": "something-new"},
        {**said(), "isCompactSummary": True},
        {**said(), "isSidechain": True},
        said("[Request interrupted by user]"),
        {"type": "attachment", "attachment": {"type": "edited_text_file"}},
        {**said(), "toolUseResult": {"backgroundTaskId": "b1"}},
        called("Bash", command="sleep 60", run_in_background=True)[0],
        called("Task", prompt="look")[0],
        called("TaskCreate", subject="later")[0],
        {"type": "assistant", "message": {}},
    ],
    ids=lambda line: json.dumps(line)[:40],
)
def test_whatever_may_be_more_than_its_messages_is_resumed(line: Mapping[str, Any]) -> None:
    assert files_seen(transcript(*PLAIN)) == {}
    assert files_seen(transcript(*PLAIN, line)) is None


def test_half_a_line_is_not_told() -> None:
    assert files_seen(transcript(*PLAIN)[:-20]) is None


def kept_at(root: Path, *lines: Mapping[str, Any]) -> Resume:
    path = transcript_path(root / "home", PurePosixPath("/work"), UUID)
    path.parent.mkdir(parents=True)
    path.write_bytes(transcript(*lines))
    (root / "work").mkdir()
    resume = Resume(UUID, root)
    resume.ready.set()
    return resume


async def test_a_file_that_changed_since_it_was_read_is_what_the_cli_tells_of_after_resume(tmp_path: Path) -> None:
    resume = kept_at(tmp_path, *PLAIN, *called("Read", file_path="/work/a"), *called("Edit", file_path="/tmp/gone"))
    file = tmp_path / "work/a"
    assert await retelling(resume, []) is None, "it is not there any more"
    file.write_text("one")
    assert await retelling(resume, []) is None, "it was written later"
    os.utime(file, ns=(AT_MS * 1_000_000, AT_MS * 1_000_000))
    assert await retelling(resume, []) == Retelling((("/work/a", AT_MS),))
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert await retelling(resume, []) is None


async def test_what_is_long_or_still_on_its_way_is_resumed(tmp_path: Path) -> None:
    resume = kept_at(tmp_path, *PLAIN)
    message = Message("user", "hello")
    assert await retelling(resume, [message] * MAX_MESSAGES) == Retelling()
    assert await retelling(resume, [message] * (MAX_MESSAGES + 1)) is None
    told_anyway = Resume("", tmp_path, resume.ready)
    assert await retelling(told_anyway, [message] * (MAX_MESSAGES + 1)) == Retelling()
    resume.ready.clear()
    assert await retelling(resume, []) is None
    assert await retelling(told_anyway, []) is None


# Files into a running slot ---------------------------------------------------------------------------------------------


def kept_files(root: Path) -> Path:
    home, work = root / "home", root / "work"
    for directory in (home / ".claude/projects/-work", work / ".mnt/session/outputs"):
        directory.mkdir(parents=True)
    (home / ".claude.json").write_text("kept")
    (home / ".claude/projects/-work/one.jsonl").write_text("{}")
    (work / "note").write_text("plum")
    (work / ".mnt/session/outputs/report").write_text("fig")
    (work / "link").symlink_to("/etc")
    return root


def test_files_move_into_directories_that_a_process_sees_already(tmp_path: Path) -> None:
    kept, dirs = kept_files(tmp_path / "kept"), create(tmp_path / "slot", None)
    (dirs.home / ".claude/projects").mkdir(parents=True)
    (dirs.home / ".claude.json").write_text("the spare's")
    (dirs.home / ".claude/own").write_text("own")
    (dirs.work / ".mnt/session/outputs").mkdir(parents=True)
    seen = {
        path: path.stat().st_ino
        for path in (dirs.home, dirs.work, dirs.work / ".mnt", dirs.work / ".mnt/session/outputs")
    }
    slotfiles.move_into(kept, dirs, None)
    assert {path: path.stat().st_ino for path in seen} == seen, "the sandbox shows these very directories"
    assert (dirs.home / ".claude.json").read_text() == "kept"
    assert (dirs.home / ".claude/own").read_text() == "own"
    assert (dirs.home / ".claude/projects/-work/one.jsonl").exists()
    assert (dirs.work / "note").read_text() == "plum"
    assert (dirs.work / ".mnt/session/outputs/report").read_text() == "fig"
    assert (dirs.work / "link").readlink() == Path("/etc")
    assert not kept.exists()


def test_a_link_in_place_of_a_directory_leads_nowhere(tmp_path: Path) -> None:
    kept, dirs, outside = tmp_path / "kept", create(tmp_path / "slot", None), tmp_path / "outside"
    outside.mkdir()
    for directory in (kept / "home", kept / "work"):
        directory.mkdir(parents=True)
    (kept / "home/.claude").symlink_to(outside)
    (kept / "work/.mnt").symlink_to(outside)
    (dirs.home / ".claude").mkdir()
    (dirs.home / ".claude/own").write_text("own")
    (dirs.work / ".mnt").mkdir()
    slotfiles.move_into(kept, dirs, None)
    assert list(outside.iterdir()) == []
    assert (dirs.work / ".mnt").is_dir()
    assert not (dirs.work / ".mnt").is_symlink()


def test_files_that_cannot_be_moved_are_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, dirs = kept_files(tmp_path / "kept"), create(tmp_path / "slot", None)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == kept / "work/note":
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        slotfiles.move_into(kept, dirs, None)
    assert (kept / "home/.claude.json").read_text() == "kept"
    assert (kept / "home/.claude/projects/-work/one.jsonl").exists()
    assert (kept / "work/note").read_text() == "plum"
    assert (kept / "work/.mnt/session/outputs/report").read_text() == "fig"


# What is left of a process that ends before it has answered --------------------------------------------------------------


def process(session_uuid: str | None, adopted: Resume | None, *, half_told: bool) -> SlotProcess:
    nothing: Any = None
    agent: Any = SimpleNamespace(session_uuid=session_uuid)
    return SlotProcess(
        "slot", AGENT, agent, nothing, nothing, nothing, None, nothing,
        primed=False, initialized=True, model="", adopted=adopted, half_told=half_told,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("adopted", "half_told", "expected"),
    [("old", True, "old"), ("", True, ""), (None, True, ""), ("old", False, "new"), (None, False, "new")],
)
def test_a_transcript_that_may_lack_its_end_is_not_resumed_from(
    adopted: str | None, expected: str, tmp_path: Path, *, half_told: bool
) -> None:
    before = None if adopted is None else Resume(adopted, tmp_path)
    left = process("new", before, half_told=half_told).keep(tmp_path / "next")
    assert left is not None
    assert left.uuid == expected
