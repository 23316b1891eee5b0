"""When a conversation's files are saved, given up, tried again, and what is said when they come back."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest

from claude_wrapper.agent.launch import transcript_path
from claude_wrapper.sessions import clitranscripts
from claude_wrapper.sessions.clitranscripts import has_transcript, put_transcript
from claude_wrapper.sessions.restoring import differences, resumable
from claude_wrapper.sessions.snapshots import Position, Restored, Snapshot
from claude_wrapper.sessions.snapshots.manifest import Skipped

UUID = "11111111-2222-4333-8444-555555555555"
SNAPSHOT = Snapshot(
    "snap_one",
    "sesn_one",
    datetime.now(UTC),
    1,
    1,
    1,
    1,
    1,
    UUID,
    "2.1.327 (Claude Code)",
    position=Position(4, exact=True),
)
RESTORED = Restored(Path("home"), Path("work"), UUID, SNAPSHOT, fell_back=False)


@pytest.mark.parametrize(
    ("snapshot", "past", "version", "expected"),
    [
        (SNAPSHOT, 4, "2.1.327 (Claude Code)", True),
        (SNAPSHOT, 6, "2.1.327 (Claude Code)", False),
        (SNAPSHOT, 2, "2.1.327 (Claude Code)", False),
        (SNAPSHOT, 4, "2.1.328 (Claude Code)", False),
        (replace(SNAPSHOT, position=Position(4, exact=False)), 4, "2.1.327 (Claude Code)", False),
        (replace(SNAPSHOT, cli_uuid=""), 4, "2.1.327 (Claude Code)", False),
    ],
)
def test_a_transcript_is_resumed_only_where_it_is_exact(
    snapshot: Snapshot, past: int, version: str, *, expected: bool
) -> None:
    assert resumable(snapshot, past, version) is expected


def test_nothing_is_said_of_a_snapshot_that_is_whole() -> None:
    assert differences(RESTORED, 4) == []


def test_what_is_missing_is_said() -> None:
    assert "message 4 of 6" in differences(RESTORED, 6)[0]
    damaged = replace(RESTORED, fell_back=True, damage="it does not open")
    assert "it does not open" in differences(damaged, 4)[0]
    torn = replace(RESTORED, snapshot=replace(SNAPSHOT, torn=(Skipped(1, b"db.sqlite", "changed"),)))
    assert "db.sqlite" in differences(torn, 4)[0]


def _home(root: Path, work: str) -> Path:
    path = transcript_path(root, PurePosixPath(work), UUID)
    path.parent.mkdir(parents=True)
    path.write_text('{"uuid":"first"}\n{"uuid":"last"}\n')
    return path


def test_a_transcript_moves_to_where_the_next_process_looks(tmp_path: Path) -> None:
    before = _home(tmp_path, "/slots/one/work")
    (before.parent / UUID).mkdir()
    there = transcript_path(tmp_path, PurePosixPath("/slots/two/work"), UUID)
    assert put_transcript(tmp_path, UUID, there)
    assert there.is_file()
    assert (there.parent / UUID).is_dir()
    assert not before.exists()
    assert put_transcript(tmp_path, UUID, there), "it is there already"
    assert has_transcript(tmp_path, UUID, last="last")
    assert not has_transcript(tmp_path, UUID, last="of another turn")


def test_more_directories_than_the_server_may_open_are_not_held_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _home(tmp_path, "/work")
    for number in range(20):
        (tmp_path / ".claude" / "projects" / f"!{number}").mkdir()  # all of them are looked into first
    before, most = len(os.listdir("/proc/self/fd")), 0
    names = clitranscripts._is_file

    def counted(name: str, directory: int) -> bool:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        return names(name, directory)

    monkeypatch.setattr(clitranscripts, "_is_file", counted)
    assert has_transcript(tmp_path, UUID, last="last")
    assert most - before < 5


@pytest.mark.parametrize("outside_is", ["source", "target"])
def test_a_forged_id_moves_nothing_into_a_home_or_out_of_it(tmp_path: Path, outside_is: str) -> None:
    # The id comes out of the process's frames: an agent that writes to its pipe says what it likes.
    projects, outside = tmp_path / "home/.claude/projects", tmp_path / "outside"
    outside.mkdir()
    for project, linked in (("-a", outside_is == "source"), ("-work", outside_is == "target")):
        (projects / project).mkdir(parents=True)
        if linked:
            (projects / project / "sub").symlink_to(outside)
        else:
            (projects / project / "sub").mkdir()
    source = outside if outside_is == "source" else projects / "-a/sub"
    (source / "evil.jsonl").write_text("{}")
    (source / "evil").write_text("* * * * * root id")
    home = tmp_path / "home"
    before = sorted(path for path in tmp_path.rglob("*"))
    assert not has_transcript(home, "sub/evil")
    assert not put_transcript(home, "sub/evil", transcript_path(home, PurePosixPath("/work"), UUID))
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_links_of_a_tenant_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    _home(outside, "/work")
    home = tmp_path / "home"
    (home / ".claude").mkdir(parents=True)
    (home / ".claude" / "projects").symlink_to(outside / ".claude" / "projects")
    assert not has_transcript(home, UUID)
    (home / ".claude" / "projects").unlink()
    (home / ".claude" / "projects").mkdir()
    (home / ".claude" / "projects" / "-work").symlink_to(outside / ".claude" / "projects" / "-work")
    assert not has_transcript(home, UUID)
    assert not put_transcript(home, UUID, transcript_path(home, PurePosixPath("/work"), UUID))
