"""Snapshots: what is saved comes back, a small change costs little, and nothing of another organisation opens."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from snapshots_world import OURS, SESSION, THEIRS, UUID, Bench, tree, write
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, RequestTooLarge, SnapshotCorrupted
from claude_wrapper.sessions.snapshots import Position, Progress, packing
from claude_wrapper.sessions.snapshots.manifest import Bounds

pytestmark = pytest.mark.anyio


async def test_a_session_comes_back_with_the_same_bytes_modes_times_and_links(everywhere: Bench) -> None:
    one = everywhere
    write(one.home, ".claude/projects/-work/a.jsonl", b'{"type":"user"}\n' * 500)
    write(one.home, ".claude.json", b"{}", 0o600)
    write(one.home, ".cache/not-needed", b"x" * 100)
    write(one.work, "src/main.py", b"print(1)\n")
    write(one.work, "src/run.sh", b"#!/bin/sh\n", 0o755)
    write(one.work, "large.bin", os.urandom(5_000_000), 0o400)
    write(one.work, "empty", b"")
    write(one.work, b"not-utf8-\xff\xfe", b"bytes")
    (one.work / "void").mkdir(mode=0o750)
    (one.work / "src" / "link").symlink_to("../large.bin")
    saved = await one.save(cli_version="2.1.0")
    back = await one.restore()
    assert back is not None
    assert tree(back.work) == tree(one.work)
    assert set(tree(back.home)) == {".claude", ".claude/projects", ".claude/projects/-work", ".claude.json"} | {
        ".claude/projects/-work/a.jsonl"
    }
    assert tree(back.home / ".claude") == tree(one.home / ".claude")
    assert (back.cli_uuid, back.fell_back, back.snapshot.id) == (UUID, False, saved.id)
    assert back.snapshot.cli_version == "2.1.0"
    assert not list(one.root.glob(".back*"))


async def test_a_turn_that_changed_one_file_stores_about_one_file(everywhere: Bench) -> None:
    one = everywhere
    for number in range(40):
        write(one.work, f"d{number % 4}/f{number}", os.urandom(100_000))
    first = await one.save()
    assert first.bytes_written > 4_000_000
    nothing = await one.save()
    assert nothing.bytes_read == 0
    write(one.work, "d1/f1", os.urandom(50_000))
    second = await one.save()
    assert second.bytes_read == 50_000
    assert 50_000 < second.bytes_written < 60_000
    back = await one.restore()
    assert back is not None
    assert tree(back.work) == tree(one.work)


async def test_a_transcript_that_grew_stores_its_last_part_alone(here: Bench) -> None:
    start = os.urandom(10 << 20)
    write(here.home, ".claude/projects/p/t.jsonl", start)
    await here.save()
    write(here.home, ".claude/projects/p/t.jsonl", start + b"x" * 1000)
    second = await here.save()
    assert second.bytes_written < 10_000


async def test_a_file_that_was_moved_is_read_but_not_stored_again(here: Bench) -> None:
    write(here.work, "a", os.urandom(300_000))
    await here.save()
    (here.work / "a").rename(here.work / "b")
    assert (await here.save()).bytes_written < 2_000


async def test_a_change_in_place_that_keeps_the_size_and_sets_the_time_back_is_seen(here: Bench) -> None:
    path = write(here.work, "a", b"one")
    await here.save()
    inode = path.stat().st_ino
    write(here.work, "a", b"two")
    assert path.stat().st_ino == inode
    await here.save()
    back = await here.restore()
    assert back is not None
    assert (back.work / "a").read_bytes() == b"two"


async def test_a_file_that_was_written_just_before_the_scan_is_read_once_more(here: Bench) -> None:
    here.clock.wall = datetime.now(UTC)
    write(here.work, "a", b"one")
    await here.save()
    here.clock.advance(60)
    assert (await here.save()).bytes_read == 3
    assert (await here.save()).bytes_read == 0


async def test_sockets_devices_and_links_that_lead_outside_are_left_out_and_named(here: Bench) -> None:
    secret = write(here.root, "secret", b"of the server")
    write(here.work, "kept", b"x")
    os.mkfifo(here.work / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.work / "s"))
    for name, target in {"abs": str(secret), "up": "../secret", "hop": "d/../../secret", "in": "d/kept"}.items():
        (here.work / name).symlink_to(target)
    (here.work / "d").symlink_to(".")
    saved = await here.save()
    assert {os.fsdecode(one.path) for one in saved.skipped} == {"fifo", "s", "abs", "up", "hop"}
    back = await here.restore()
    assert back is not None
    assert set(tree(back.work)) == {"kept", "d", "in"}


@pytest.mark.parametrize("name", [".claude", ".claude/projects", ".claude.json"])
async def test_a_home_whose_parts_are_links_gives_nothing_of_the_server(here: Bench, name: str) -> None:
    write(here.root, "outside/projects/secret", b"of the server")
    path = here.home / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(here.root / "outside")
    saved = await here.save()
    assert saved.bytes_logical == 0
    assert saved.skipped_count >= 1


async def test_setuid_does_not_come_back(here: Bench) -> None:
    write(here.work, "tool", b"x", 0o4755)
    await here.save()
    back = await here.restore()
    assert back is not None
    assert (back.work / "tool").stat().st_mode & 0o7777 == 0o755


async def test_a_session_without_a_snapshot_restores_nothing_and_another_organisation_has_none(here: Bench) -> None:
    assert await here.restore() is None
    await here.save()
    assert await here.restore("theirs", org=THEIRS) is None
    assert await here.restore("other", session="sesn_two") is None


async def test_equal_content_of_two_organisations_has_no_byte_in_common(here: Bench) -> None:
    write(here.work, "a", b"the same" * 1000)
    await here.save()
    await here.save(THEIRS)
    stored = [await here.blobs.inner.get(key) for key in await here.keys_below()]
    ours, theirs = await here.keys.of(OURS), await here.keys.of(THEIRS)
    from claude_wrapper.sessions.snapshots.packing import address_key

    assert address_key(ours) != address_key(theirs)
    assert len({content for content in stored if content}) == 6
    assert not any(b"the same" in (content or b"") for content in stored)


async def test_blobs_of_another_organisation_in_our_place_do_not_open(everywhere: Bench) -> None:
    one = everywhere
    write(one.work, "a", b"ours")
    await one.save()
    write(one.work, "a", b"their")
    await one.save(THEIRS)
    ours = sorted(await one.keys_below(f"snapshots/{OURS}"))
    theirs = sorted(await one.keys_below(f"snapshots/{THEIRS}"))
    for mine, other in zip(ours, theirs, strict=True):
        kept = await one.blobs.inner.get(mine)
        await one.blobs.inner.put(mine, await one.blobs.inner.get(other) or b"")
        with pytest.raises(SnapshotCorrupted):
            await one.restore()
        assert not (one.root / "back").exists()
        await one.blobs.inner.put(mine, kept or b"")
    assert await one.restore() is not None


async def test_a_manifest_of_another_session_in_our_place_does_not_open(here: Bench) -> None:
    write(here.work, "a", b"one")
    first, second = await here.save(), await here.save(session="sesn_two")
    other = await here.blobs.inner.get(f"snapshots/{OURS}/sesn_two/manifests/{second.id}")
    await here.blobs.inner.put(f"snapshots/{OURS}/{SESSION}/manifests/{first.id}", other or b"")
    with pytest.raises(SnapshotCorrupted):
        await here.restore()


async def test_of_two_saves_from_two_servers_one_is_refused_and_the_other_is_current(everywhere: Bench) -> None:
    one = everywhere
    other = one.with_settings()
    write(one.work, "a", b"x" * 10)
    await one.save()
    write(one.work, "a", b"y" * 20)
    saves = [one.save(), other.save(OURS, SESSION, one.home, one.work, cli_uuid=UUID)]
    done = await asyncio.gather(*saves, return_exceptions=True)
    assert {type(result).__name__ for result in done} <= {"Snapshot", "Conflict"}
    back = await one.restore()
    assert back is not None
    assert back.snapshot.id in {getattr(result, "id", None) for result in done}


async def test_more_than_the_bounds_is_refused_with_the_bound_named(here: Bench) -> None:
    for number in range(5):
        write(here.work, f"d/e/f{number}", b"x" * 100)
    for bounds, said in (
        (Bounds(entries=4), "more than 4 files"),
        (Bounds(total_bytes=300), "more than 300 bytes"),
        (Bounds(path_bytes=4), "longer than 4 bytes"),
        (Bounds(depth=2), "deeper than 2"),
        (Bounds(manifest_bytes=50), "more than the 50"),
    ):
        store = here.with_settings(bounds=bounds)
        with pytest.raises(RequestTooLarge, match=said):
            await store.save(OURS, SESSION, here.home, here.work, cli_uuid=UUID)
    await here.save()
    with pytest.raises(RequestTooLarge, match="at most 4"):
        await here.with_settings(bounds=Bounds(entries=4)).restore(OURS, SESSION, here.root / "back")
    assert not (here.root / "back").exists()


async def test_a_sparse_file_larger_than_the_bound_is_refused_before_it_is_read(here: Bench) -> None:
    path = write(here.work, "sparse", b"")
    os.truncate(path, 1 << 40)
    with pytest.raises(RequestTooLarge):
        await here.save()


async def test_a_directory_that_exists_is_not_restored_into(here: Bench) -> None:
    await here.save()
    (here.root / "back").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        await here.restore()


async def test_a_workspace_that_is_gone_is_said_and_the_snapshot_stays(here: Bench) -> None:
    write(here.work, "a", b"x")
    saved = await here.save()
    with pytest.raises(NotFound, match="gone"):
        await here.store.save(OURS, SESSION, here.home, here.root / "gone", cli_uuid=UUID)
    back = await here.restore()
    assert back is not None
    assert back.snapshot.id == saved.id


@pytest.mark.parametrize("bad", ["../sesn", "sesn_a/b", "", "sesn_\x00"])
async def test_an_id_that_could_be_a_path_is_refused(here: Bench, bad: str) -> None:
    with pytest.raises(InvalidRequest):
        await here.save(session=bad)
    with pytest.raises(InvalidRequest):
        await here.store.delete(bad, SESSION)


async def test_progress_ends_at_the_whole_and_the_event_loop_is_not_blocked(here: Bench) -> None:
    for number in range(6):
        write(here.work, f"f{number}", os.urandom(2 << 20))
    seen: list[Progress] = []
    threads: set[int] = set()
    here.blobs.hang = asyncio.Event()

    def told(progress: Progress) -> None:
        seen.append(progress)
        threads.add(threading.get_ident())

    saving = asyncio.ensure_future(here.save(progress=told))
    async with asyncio.timeout(20):
        while not here.blobs.calls:
            await asyncio.sleep(0)
    here.blobs.hang.set()
    await saving
    assert (seen[-1].done, seen[-1].total) == (12 << 20, 12 << 20)
    assert threads == {threading.get_ident()}
    assert [one.done for one in seen] == sorted(one.done for one in seen)


async def test_files_that_vanish_or_become_links_while_they_are_read_are_left_out(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from claude_wrapper.sessions.snapshots import store

    write(here.work, "stays", b"x")
    write(here.work, "goes", b"x")
    write(here.work, "turns", b"x")
    write(here.root, "secret", b"of the server")
    real = store.scan

    def then_change(home: Path, work: Path, bounds: Bounds) -> object:
        found = real(home, work, bounds)
        (work / "goes").unlink()
        (work / "turns").unlink()
        (work / "turns").symlink_to("../secret")
        return found

    monkeypatch.setattr(store, "scan", then_change)
    saved = await here.save()
    assert {os.fsdecode(one.path) for one in saved.skipped} == {"goes", "turns"}
    back = await here.restore()
    assert back is not None
    assert set(tree(back.work)) == {"stays"}


async def test_what_did_not_change_is_not_stored_again_and_the_snapshot_stays_the_same(here: Bench) -> None:
    write(here.work, "a", b"x" * 5000)
    first = await here.save(position=Position(4, exact=True))
    before = await here.keys_below()
    same = await here.save(position=Position(4, exact=True))
    assert (same.id, same.unchanged, same.bytes_written) == (first.id, True, 0)
    assert await here.keys_below() == before
    moved = await here.save(position=Position(6, exact=False))
    assert (moved.unchanged, moved.id != first.id) == (False, True)
    back = await here.restore()
    assert back is not None
    assert back.snapshot.position == Position(6, exact=False)


@pytest.mark.parametrize("rest", ["it settles", "it never settles"])
async def test_a_file_that_changes_while_it_is_read_is_read_again_or_named(
    here: Bench, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    path = write(here.work, "growing", b"half")
    write(here.work, "still", b"whole")
    real, reads = packing.read_portion, 0

    def meanwhile(*args: object) -> packing.Portion:
        nonlocal reads
        reads += 1
        if reads == 1 or rest == "it never settles":
            path.write_bytes(b"written " * (reads + 1))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "read_portion", meanwhile)
    saved = await here.save()
    monkeypatch.undo()
    back = await here.restore()
    assert back is not None
    assert (back.work / "still").read_bytes() == b"whole"
    if rest == "it settles":
        assert saved.torn == ()
        assert (back.work / "growing").read_bytes() == b"written written "
    else:
        assert [one.path for one in back.snapshot.torn] == [b"growing"]


async def test_a_guard_that_refuses_leaves_the_snapshot_before_current(here: Bench) -> None:
    write(here.work, "a", b"x")
    first = await here.save()
    write(here.work, "a", b"y")

    async def lost(tx: AsyncConnection) -> None:
        raise Conflict("the lease was lost")

    with pytest.raises(Conflict, match="the lease was lost"):
        await here.save(guard=lost)
    back = await here.restore()
    assert back is not None
    assert (back.snapshot.id, (back.work / "a").read_bytes()) == (first.id, b"x")
