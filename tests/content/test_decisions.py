"""Decisions about a session's workspace: where a path lies, what becomes of a memory that changed."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.content import manifest as notes
from claude_wrapper.sessions.content import places, trees
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.content.memorysync import Do, conflict_path, plan

CONTENTS = st.dictionaries(st.sampled_from(["/a", "/b", "/c/d"]), st.sampled_from(["1", "2", "3"]))


def carried_out(
    base: dict[str, str], here: dict[str, str], there: dict[str, str], *, read_only: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Directory and store after one plan."""
    here, there = dict(here), dict(there)
    for path, what in plan(base, here, there, read_only=read_only).items():
        if what is Do.KEEP_BOTH:
            there[conflict_path(path, "sesn_12345678", here | there)] = here[path]
        source, target = (here, there) if what is Do.GIVE else (there, here)
        if path in source:
            target[path] = source[path]
        else:
            target.pop(path, None)
    return here, there


@given(CONTENTS, CONTENTS, CONTENTS)
def test_both_sides_agree_after_two_rounds_and_nobodys_text_is_lost(
    base: dict[str, str], here: dict[str, str], there: dict[str, str]
) -> None:
    first = carried_out(base, here, there, read_only=False)
    second = carried_out({p: v for p, v in first[0].items() if first[1].get(p) == v}, *first, read_only=False)
    assert second[0] == second[1]
    for path, text in here.items():
        if base.get(path) != text:
            assert text in second[1].values(), f"what the agent wrote to {path} is gone"
    for path, text in there.items():
        if base.get(path) != text:
            assert second[1].get(path) == text, "what somebody else wrote stands"


@given(CONTENTS, CONTENTS, CONTENTS)
def test_a_read_only_store_is_never_changed_and_its_directory_is_what_it_holds(
    base: dict[str, str], here: dict[str, str], there: dict[str, str]
) -> None:
    assert carried_out(base, here, there, read_only=True) == (there, there)


def test_a_conflict_keeps_the_ending_of_the_name_and_takes_a_free_one() -> None:
    assert conflict_path("/a/b.md", "sesn_12345678", {}) == "/a/b.conflict-12345678.md"
    assert conflict_path("/a/b.md", "sesn_12345678", {"/a/b.conflict-12345678.md": ""}) == (
        "/a/b.conflict-12345678-2.md"
    )
    assert conflict_path("/README", "sesn_12345678", {}) == "/README.conflict-12345678"
    assert conflict_path("/.env", "sesn_12345678", {}) == "/.env.conflict-12345678"


@pytest.mark.parametrize(
    ("path", "below"),
    [
        ("/workspace/a/b", "a/b"),
        ("/workspace", ""),
        ("/work/a", "a"),
        ("/mnt/session/uploads/x", ".mnt/session/uploads/x"),
    ],
)
def test_paths_of_the_api_lie_below_the_workspace(path: str, below: str) -> None:
    assert places.relative(path) == below
    assert places.Seen(PurePosixPath("/work"), bound=True).path(path) == path
    assert places.Seen(PurePosixPath("/x/work"), bound=False).path(path) == f"/x/work/{below}".rstrip("/")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/workspace",
        "/mnt",
        "/workspacex/a",
        "/workspace/../etc",
        "/workspace//a",
        "/workspace/a/",
        "a/b",
        "/mnt/memory/x/y",
        "/mnt/skills/x",
        "/mnt/.server/content.json",
        "/workspace/.mnt/memory/x",
        "/work/.mnt",
        "/workspace/" + "a/" * 40 + "b",
        "/workspace/" + "x" * 256,
        "/mnt/../workspace/x",
        "/mnt/x\x00",
    ],
)
def test_places_that_cannot_be_mounted_to_are_refused_with_the_field(path: str) -> None:
    with pytest.raises(InvalidRequest, match=r"resources\[0\]\.mount_path"):
        places.check_mount_path(path, "resources[0].mount_path")


def test_a_link_that_a_kept_workspace_brought_is_not_bound(tmp_path: Path) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("x")
    work.mkdir()
    (work / ".mnt").symlink_to(elsewhere)
    places.make_mount_root(work, None)
    assert (work / ".mnt/memory").is_dir()
    assert not (work / ".mnt").is_symlink()
    assert [one.name for one in elsewhere.iterdir()] == ["secret"]


def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("x")
    work.mkdir()
    (work / "out").symlink_to(elsewhere)
    with pytest.raises(InvalidRequest):
        trees.begin(work, "out/secret")
    with pytest.raises(InvalidRequest):
        trees.write(work, "out/other", b"y")
    trees.remove(work, "out/secret")
    assert list(trees.entries(work, "out", most=10)) == []
    (work / "link").symlink_to(elsewhere / "secret")
    incoming = trees.begin(work, "link")
    incoming.file.write(b"mine")
    incoming.finish()
    assert (work / "link").read_text() == "mine"
    assert [(one.name, one.read_text()) for one in elsewhere.iterdir()] == [("secret", "x")]


@pytest.mark.parametrize("path", ["..", "a/..", "a/../..", "/etc", "", ".", "a/../../b"])
def test_what_a_forged_note_names_is_removed_below_the_workspace_alone(tmp_path: Path, path: str) -> None:
    work = tmp_path / "work"
    (work / "a").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    with pytest.raises(InvalidRequest):
        trees.remove(work, path)
    with pytest.raises(InvalidRequest):
        trees.begin(work, path)
    with pytest.raises(InvalidRequest):
        trees.move_in(tmp_path / "home", work, path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["home", "work"]
    assert [one.name for one in work.iterdir()] == ["a"]


def test_texts_say_what_is_none_and_stop_at_their_bounds(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "good.md").write_text("good")
    (store / "binary").write_bytes(b"\xff\xfe")
    (store / "long").write_text("x" * 100)
    os.mkfifo(store / "fifo")
    (store / "link").symlink_to("good.md")
    (store / os.fsdecode(b"name\xff")).write_text("good")
    found = trees.texts(tmp_path, "store", most=10, bytes_each=50, bytes_all=1000)
    assert found.found == {"/good.md": "good"}
    assert set(found.left_out) == {"/binary", "/long", "/fifo", "/link", "/name\ufffd"}


@pytest.mark.parametrize(
    "note", [b"", b"[]", b'{"placed": 3}', b'{"outputs": {"a": {"size": "x"}}}', b"\xff", b'{"x":' + b"[" * 50_000]
)
def test_a_note_that_the_agent_spoilt_counts_as_none(tmp_path: Path, note: bytes) -> None:
    (tmp_path / ".mnt/.server").mkdir(parents=True)
    (tmp_path / notes.PATH).write_bytes(note)
    assert notes.load(tmp_path) == Manifest()
    notes.save(tmp_path, Manifest(placed={"a": "b"}))
    assert notes.load(tmp_path).placed == {"a": "b"}
