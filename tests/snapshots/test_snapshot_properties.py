"""Whatever a session does to its files: what was saved comes back, and what is needed is never removed."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshots_world import OURS, SESSION, Bench, bench, tree

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_blobs

NAMES = st.sampled_from(["a", "b", "c", "d", "ü", "x y", os.fsdecode(b"\xff")])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
CONTENT = st.one_of(
    st.binary(max_size=50),
    st.tuples(st.binary(min_size=1, max_size=8), st.sampled_from([1000, 1 << 18, 300_000])).map(lambda p: p[0] * p[1]),
)


@dataclass(frozen=True)
class Write:
    path: str
    content: bytes
    mode: int


@dataclass(frozen=True)
class Link:
    path: str
    target: str


@dataclass(frozen=True)
class Remove:
    path: str


@dataclass(frozen=True)
class Mode:
    path: str
    mode: int


MODES = st.integers(0, 0o777)
CHANGES = st.one_of(
    st.builds(Write, PATHS, CONTENT, MODES),
    st.builds(Link, PATHS, st.one_of(NAMES, PATHS)),
    st.builds(Remove, PATHS),
    st.builds(Mode, PATHS, MODES),
)
COLLECT, FAIL = "collect", "fail"
TURNS = st.lists(
    st.tuples(st.lists(CHANGES, max_size=6), st.sampled_from([None, None, COLLECT, FAIL])), min_size=1, max_size=5
)


def apply(root: Path, change: object) -> None:
    """As a tenant would, who may not succeed."""
    path = root / change.path  # type: ignore[attr-defined]
    try:
        if isinstance(change, Remove):
            remove_tree(path)
        elif isinstance(change, Mode):
            if not path.is_symlink():
                path.chmod(change.mode)
        elif isinstance(change, Link):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(change.target)
        else:
            assert isinstance(change, Write)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(change.content)
            path.chmod(change.mode)
    except OSError:
        return


@given(turns=TURNS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.skipif(os.geteuid() != 0, reason="a tenant's closed files are readable by root alone")
def test_after_any_changes_failures_and_collections_the_last_saved_state_comes_back(
    turns: list[tuple[list[object], str | None]], sqlite_template: Path
) -> None:
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(play(Path(name), turns, sqlite_template))


async def play(root: Path, turns: list[tuple[list[object], str | None]], template: Path) -> None:
    (root / "t.db").write_bytes(template.read_bytes())
    db = Database(f"sqlite:///{root / 't.db'}")
    try:
        one = await bench(db, open_blobs("memory://"), root)
        saved: dict[str, object] | None = None
        for number, (changes, then) in enumerate(turns):
            for change in changes:
                apply(one.work, change)
            if then == FAIL:
                apply(one.work, Write("changed", b"%d" % number, 0o644))  # else there may be nothing to store
                one.blobs.calls, one.blobs.fail_at = 0, 2 if saved is not None else 1
                with pytest.raises(StorageUnavailable):
                    await one.save()  # reads or writes the list of files at least
                one.blobs.fail_at = None
            else:
                await one.save()
                saved = dict(tree(one.work))
            if then == COLLECT:
                one.clock.advance(7 * 3600)
                await one.store.collect(OURS)
            await came_back(one, f"back{number}", saved)
        await the_one_before_is_whole(one)
    finally:
        await db.close(grace=5)


async def came_back(one: Bench, name: str, saved: dict[str, object] | None) -> None:
    back = await one.restore(name)
    assert (None if back is None else tree(back.work)) == saved
    assert back is None or back.fell_back is False


async def the_one_before_is_whole(one: Bench) -> None:
    """Collection kept everything that the previous snapshot needs too."""
    from claude_wrapper.sessions.snapshots import rows

    row = await rows.current(one.db, OURS, SESSION)
    if row is None or row.previous is None:
        return
    one.clock.advance(7 * 3600)
    await one.store.collect(OURS)
    await one.damage(f"snapshots/{OURS}/{SESSION}/manifests/{row.manifest}")
    back = await one.restore("before")
    assert back is not None
    assert (back.snapshot.id, back.fell_back) == (row.previous, True)
