"""What happens to snapshots when the blob store fails, hangs, is full or gives back something else; and what is removed."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from snapshots_world import OURS, SESSION, THEIRS, UUID, Bench, tree, write

from claude_wrapper.errors import Conflict, SnapshotCorrupted, StorageUnavailable, WrapperError
from claude_wrapper.sessions.snapshots import SnapshotSettings, rows
from claude_wrapper.sessions.snapshots.manifest import (
    DIRECTORY,
    FILE,
    LINK,
    WORK,
    Bounds,
    Chunk,
    Entry,
    Head,
    Manifest,
    Pack,
    check,
    cut,
    encode,
    link_stays_inside,
)
from claude_wrapper.sessions.snapshots.packing import seal_pages

pytestmark = pytest.mark.anyio


async def two_snapshots(one: Bench) -> tuple[str, str, dict[str, object]]:
    """Ids of both, and the tree of the first."""
    write(one.work, "same", os.urandom(200_000))
    write(one.work, "changing", os.urandom(5 << 20))
    first, before = await one.save(), dict(tree(one.work))
    write(one.work, "changing", os.urandom(6 << 20))
    return first.id, (await one.save()).id, before


async def test_a_blob_store_that_fails_at_any_step_leaves_the_snapshot_before_current(everywhere: Bench) -> None:
    one = everywhere
    _, second, _ = await two_snapshots(one)
    before = tree(one.work)
    write(one.work, "changing", os.urandom(9 << 20))
    write(one.work, "new", os.urandom(100))
    steps = 0
    while True:
        one.blobs.calls, one.blobs.fail_at = 0, steps + 1
        try:
            await one.save()
        except StorageUnavailable as error:
            said = error.message
        else:
            break
        finally:
            one.blobs.fail_at = None
        back = await one.restore(f"back{steps}")
        assert back is not None
        assert (back.snapshot.id, back.fell_back) == (second, False)
        assert tree(back.work) == before
        assert "no space left" in said
        steps += 1
    assert steps >= 4
    after = await one.restore("after")
    assert after is not None
    assert tree(after.work) == tree(one.work)


async def test_a_restore_that_fails_at_any_step_leaves_no_directory_and_the_snapshot_current(everywhere: Bench) -> None:
    one = everywhere
    _, second, _ = await two_snapshots(one)
    steps = 0
    while True:
        one.blobs.calls, one.blobs.fail_at = 0, steps + 1
        try:
            back = await one.restore()
        except StorageUnavailable:
            assert not (one.root / "back").exists()
            assert not list(one.root.glob(".back*"))
            steps += 1
        else:
            break
        finally:
            one.blobs.fail_at = None
    assert steps >= 3
    assert back is not None
    assert (back.snapshot.id, back.fell_back) == (second, False)


async def test_a_blob_store_that_hangs_is_given_up_and_the_snapshot_before_stays(here: Bench) -> None:
    write(here.work, "a", b"x" * 1000)
    saved = await here.save()
    impatient = here.with_settings(blob_seconds=0.05)
    write(here.work, "a", b"y" * 2000)
    here.blobs.hang = asyncio.Event()
    with pytest.raises(StorageUnavailable, match=r"within 0\.05 s"):
        await impatient.save(OURS, SESSION, here.home, here.work, cli_uuid=UUID)
    with pytest.raises(StorageUnavailable, match="did not read"):
        await impatient.restore(OURS, SESSION, here.root / "back")
    here.blobs.hang = None
    back = await here.restore()
    assert back is not None
    assert back.snapshot.id == saved.id


async def test_a_save_takes_no_longer_than_it_may(here: Bench) -> None:
    hasty = here.with_settings(save_seconds=0.05, grace_seconds=1.0)
    write(here.work, "a", b"x")
    here.blobs.hang = asyncio.Event()
    with pytest.raises(StorageUnavailable, match="was not done within"):
        await hasty.save(OURS, SESSION, here.home, here.work, cli_uuid=UUID)


def test_blobs_must_outlive_the_save_that_writes_them() -> None:
    with pytest.raises(ValueError, match="at least twice"):
        SnapshotSettings(save_seconds=100, grace_seconds=150)


async def test_a_save_that_is_cancelled_leaves_the_snapshot_before_and_does_not_block_the_next(here: Bench) -> None:
    write(here.work, "a", b"x" * 10)
    await here.save()
    write(here.work, "a", b"y" * 20)
    here.blobs.hang = asyncio.Event()
    saving = asyncio.ensure_future(here.save())
    calls = here.blobs.calls
    async with asyncio.timeout(20):
        while here.blobs.calls == calls:
            await asyncio.sleep(0)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        here.blobs.hang = None
        await here.save()
    back = await here.restore()
    assert back is not None
    assert (back.work / "a").read_bytes() == b"y" * 20


async def test_a_database_that_fails_at_the_last_step_leaves_the_snapshot_before(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here.work, "a", b"x" * 10)
    saved = await here.save()

    async def away(*_: object, **__: object) -> None:
        raise StorageUnavailable

    monkeypatch.setattr(rows, "replace", away)
    write(here.work, "a", b"y" * 20)
    with pytest.raises(StorageUnavailable):
        await here.save()
    monkeypatch.undo()
    back = await here.restore()
    assert back is not None
    assert (back.snapshot.id, (back.work / "a").read_bytes()) == (saved.id, b"x" * 10)


async def test_a_damaged_snapshot_falls_back_to_the_one_before_and_says_so(everywhere: Bench) -> None:
    one = everywhere
    first, second, before = await two_snapshots(one)
    await one.damage(f"snapshots/{OURS}/{SESSION}/manifests/{second}")
    back = await one.restore()
    assert back is not None
    assert (back.snapshot.id, back.fell_back) == (first, True)
    assert second in str(back.damage)
    assert tree(back.work) == before
    row = await rows.current(one.db, OURS, SESSION)
    assert row is not None
    assert (row.manifest, row.previous) == (first, None)


@pytest.mark.parametrize("pack", [-2, -3], ids=["pages", "content"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "empty"])
async def test_whatever_happens_to_a_pack_of_the_last_snapshot_the_one_before_comes_back(
    here: Bench, how: str, pack: int
) -> None:
    first, _, before = await two_snapshots(here)
    newest = list(here.blobs.puts)[pack]
    assert "/packs/" in newest
    content = await here.blobs.inner.get(newest) or b""
    if how == "flipped":
        await here.damage(newest, len(content) // 2)
    elif how == "missing":
        await here.blobs.inner.delete(newest)
    else:
        await here.blobs.inner.put(newest, content[:50] if how == "cut" else b"")
    back = await here.restore()
    assert back is not None
    assert (back.snapshot.id, back.fell_back) == (first, True)
    assert tree(back.work) == before
    assert not list(here.root.glob(".back*"))


async def test_after_a_fall_back_the_same_work_done_again_is_stored_anew(here: Bench) -> None:
    await two_snapshots(here)
    again = tree(here.work)
    newest = list(here.blobs.puts)[-3]
    await here.damage(newest)
    assert await here.restore() is not None
    await here.save()
    back = await here.restore("again")
    assert back is not None
    assert back.fell_back is False
    assert tree(back.work) == again


async def test_when_both_are_damaged_the_caller_learns_it_and_a_new_save_starts_afresh(here: Bench) -> None:
    first, second, _ = await two_snapshots(here)
    for snapshot in (first, second):
        await here.damage(f"snapshots/{OURS}/{SESSION}/manifests/{snapshot}")
    with pytest.raises(SnapshotCorrupted, match="no snapshot"):
        await here.restore()
    await here.save()
    back = await here.restore()
    assert back is not None
    assert tree(back.work) == tree(here.work)


@pytest.mark.parametrize(("path", "target"), [(b"a", b"b"), (b"d/a", b"../b"), (b"d/e/a", b"../../x/y"), (b"a", b".")])
def test_links_that_stay_inside(path: bytes, target: bytes) -> None:
    assert link_stays_inside(path, target)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"a", b"/etc"),
        (b"a", b".."),
        (b"d/a", b"../.."),
        (b"d/a", b"x/../../y"),
        (b"a", b""),
        (b"a", b"x\0"),
        (b"a", b"b/.."),
    ],
)
def test_links_that_may_lead_outside(path: bytes, target: bytes) -> None:
    assert not link_stays_inside(path, target)


def manifest(*entries: Entry, chunks: tuple[Chunk, ...] = ()) -> Manifest:
    return Manifest(list(entries), list(chunks), [Pack("pack_x", 100)])


async def forge(one: Bench, made: Manifest) -> None:
    """Make it the current snapshot, as if somebody had the keys."""
    keys = await one.keys.of(OURS)
    ids, sealed = seal_pages(cut(made, Bounds()), {}, keys)
    packs = [*made.packs, Pack("pack_pages", len(sealed.pack))]
    pages = [Chunk(chunk.id, 1, chunk.offset, chunk.stored, chunk.plain) for chunk in sealed.chunks]
    assert [page.id for page in pages] == ids
    head = Head(1, "snap_x", SESSION, 0, UUID, "", [], 0, 0, len(made.entries), pages, packs)
    await one.blobs.put(f"snapshots/{OURS}/{SESSION}/packs/pack_pages", bytes(sealed.pack))
    await one.blobs.put(f"snapshots/{OURS}/{SESSION}/manifests/snap_x", encode(head, keys))
    row = rows.Current("snap_x", None, datetime.now(UTC), 0, 0, UUID, "")
    await rows.replace(one.db, OURS, SESSION, row, seen=None)


def file(path: bytes, **kw: object) -> Entry:
    return Entry(**({"root": WORK, "path": path, "kind": FILE, "mode": 0o644, "mtime_ns": 0} | kw))  # type: ignore[arg-type]


ESCAPES = {
    "up": [file(b"../x")],
    "absolute": [file(b"/etc/passwd")],
    "hidden up": [Entry(WORK, b"d", DIRECTORY, 0o700, 0), file(b"d/../../x")],
    "dot": [file(b"./x")],
    "empty": [file(b"")],
    "nul": [file(b"a\0b")],
    "long": [file(b"x" * 300)],
    "through a link": [Entry(WORK, b"l", LINK, 0o777, 0, target=b"."), file(b"l/x")],
    "through a file": [file(b"f"), file(b"f/x")],
    "twice": [file(b"f"), file(b"f")],
    "link out": [Entry(WORK, b"l", LINK, 0o777, 0, target=b"../../etc")],
    "another root": [file(b"f", root=2)],
    "device": [file(b"f", kind="c")],
    "setuid": [file(b"f", mode=0o4755)],
    "size": [file(b"f", size=5)],
}


@pytest.mark.parametrize("entries", ESCAPES.values(), ids=ESCAPES)
async def test_a_manifest_that_would_write_outside_or_contradicts_itself_is_refused_before_anything_is_written(
    here: Bench, entries: list[Entry]
) -> None:
    made = manifest(*entries)
    with pytest.raises(SnapshotCorrupted, match="refused"):
        check(made, Bounds())
    await forge(here, made)
    before = set(here.root.iterdir())
    with pytest.raises(SnapshotCorrupted):
        await here.restore()
    assert set(here.root.iterdir()) == before


@pytest.mark.parametrize(
    "chunk", [Chunk(b"i", 1, 0, 5, 5), Chunk(b"i", 0, 96, 5, 5), Chunk(b"i", 0, -1, 5, 5), Chunk(b"i", -1, 0, 5, 5)]
)
def test_a_chunk_outside_of_its_pack_is_refused(chunk: Chunk) -> None:
    with pytest.raises(SnapshotCorrupted, match="refused"):
        check(manifest(file(b"f", size=5, chunks=(0,)), chunks=(chunk,)), Bounds())


def test_a_file_of_pieces_that_are_not_there_is_refused() -> None:
    with pytest.raises(SnapshotCorrupted, match="do not make up"):
        check(manifest(file(b"f", size=5, chunks=(0,))), Bounds())


# Removing --------------------------------------------------------------------------------------------------------------


async def test_collect_removes_what_is_old_and_unneeded_and_nothing_else(everywhere: Bench) -> None:
    one = everywhere
    _, second, _ = await two_snapshots(one)
    write(one.work, "changing", os.urandom(100))
    third = (await one.save()).id
    await one.save(THEIRS)
    assert (await one.store.collect(OURS)).blobs == 0  # all younger than the grace period
    one.clock.advance(7 * 3600)
    theirs = await one.keys_below(f"snapshots/{THEIRS}")
    collected = await one.store.collect(OURS)
    assert collected.blobs >= 3  # the first list of files and two packs of its large file
    assert collected.bytes > 5 << 20
    assert await one.keys_below(f"snapshots/{THEIRS}") == theirs
    manifests = await one.keys_below(f"snapshots/{OURS}/{SESSION}/manifests")
    assert {key.rpartition("/")[2] for key in manifests} == {second, third}
    await one.damage(f"snapshots/{OURS}/{SESSION}/manifests/{third}")
    back = await one.restore()
    assert back is not None
    assert (back.snapshot.id, back.fell_back) == (second, True)


async def test_collect_leaves_a_session_alone_whose_list_of_files_cannot_be_read(here: Bench) -> None:
    _, second, _ = await two_snapshots(here)
    await here.damage(f"snapshots/{OURS}/{SESSION}/manifests/{second}")
    here.clock.advance(7 * 3600)
    keys = await here.keys_below()
    assert (await here.store.collect(OURS)).left == 1
    assert await here.keys_below() == keys


async def test_what_a_failed_save_left_behind_is_collected(here: Bench) -> None:
    await two_snapshots(here)
    keys = await here.keys_below()
    write(here.work, "changing", os.urandom(9 << 20))
    here.blobs.calls, here.blobs.fail_at = 0, 6
    with pytest.raises(StorageUnavailable):
        await here.save()
    here.blobs.fail_at = None
    assert await here.keys_below() > keys
    here.clock.advance(7 * 3600)
    await here.store.collect(OURS)
    assert await here.keys_below() == keys


async def test_packs_that_are_mostly_unneeded_are_given_up(here: Bench) -> None:
    """Files that change one by one would otherwise keep every pack that they ever lay in."""
    for number in range(20):
        write(here.work, f"f{number:02}", os.urandom(50_000))
    for number in range(20):
        write(here.work, f"f{number:02}", os.urandom(50_000))
        saved = await here.save()
        assert saved.bytes_stored < 2.2 * saved.bytes_logical
    here.clock.advance(7 * 3600)
    await here.store.collect(OURS)
    left = sum([blob.size async for blob in here.blobs.inner.list("snapshots")])
    assert left < 3.5 * saved.bytes_logical
    back = await here.restore()
    assert back is not None
    assert tree(back.work) == tree(here.work)


async def test_a_worn_pack_that_is_gone_makes_the_save_store_everything_anew(here: Bench) -> None:
    for number in range(10):
        write(here.work, f"f{number}", os.urandom(50_000))
    await here.save()
    for key in await here.keys_below(f"snapshots/{OURS}/{SESSION}/packs"):
        await here.blobs.inner.delete(key)
    for number in range(8):
        write(here.work, f"f{number}", os.urandom(40_000))
    await here.save()
    back = await here.restore()
    assert back is not None
    assert tree(back.work) == tree(here.work)


async def test_delete_removes_one_session_and_erase_an_organisation(everywhere: Bench) -> None:
    one = everywhere
    write(one.work, "a", b"x")
    for org, session in ((OURS, SESSION), (OURS, "sesn_two"), (THEIRS, SESSION)):
        await one.save(org, session)
    await one.store.delete(OURS, SESSION)
    assert await one.restore() is None
    assert await one.keys_below(f"snapshots/{OURS}/{SESSION}") == set()
    assert await one.restore("two", session="sesn_two") is not None
    await one.store.erase(OURS)
    assert await one.keys_below(f"snapshots/{OURS}") == set()
    assert await one.restore("gone", session="sesn_two") is None
    assert await one.restore("theirs", org=THEIRS) is not None


async def test_a_deletion_that_broke_off_is_finished_by_collect(here: Bench) -> None:
    await two_snapshots(here)
    here.blobs.calls, here.blobs.fail_at = 0, 3
    with pytest.raises(StorageUnavailable):
        await here.store.delete(OURS, SESSION)
    here.blobs.fail_at = None
    assert await here.restore() is None
    assert await here.keys_below()
    here.clock.advance(7 * 3600)
    await here.store.collect(OURS)
    assert await here.keys_below() == set()


async def test_a_save_that_meets_a_deletion_does_not_bring_the_session_back(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here.work, "a", b"x")
    await here.save()
    real = rows.replace

    async def deleted_meanwhile(*args: object, **kw: object) -> None:
        await here.with_settings().delete(OURS, SESSION)
        await real(*args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(rows, "replace", deleted_meanwhile)
    write(here.work, "a", b"y")
    with pytest.raises(Conflict):
        await here.save()
    monkeypatch.undo()
    assert await here.restore() is None


async def test_a_full_disk_while_restoring_is_said_and_leaves_nothing(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here.work, "a", b"x" * 1000)
    await here.save()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WrapperError, match="No space left"):
        await here.restore()
    assert not [path for path in Path(here.root).iterdir() if "back" in path.name]


async def test_the_list_of_files_of_a_large_workspace_is_not_stored_again_for_one_file(here: Bench) -> None:
    for number in range(3000):
        write(here.work, f"d{number % 7}/f{number}", b"%d" % number)
    first = await here.save()
    written = []
    for number in range(20):
        write(here.work, f"d1/new{number}", b"x%d" % number)
        written.append((await here.save()).bytes_written)
    assert sorted(written)[len(written) // 2] < first.bytes_written / 5
    back = await here.restore()
    assert back is not None
    assert tree(back.work) == tree(here.work)
