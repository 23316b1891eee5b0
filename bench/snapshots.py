"""What a snapshot costs: save (first, unchanged, one file changed) and restore of a workspace. Prints JSON.

    python bench/snapshots.py [--megabytes 10 1000] [--directory DIR]

The workspace is two thirds source-like text in files of about 8 KB and one third a few large files of random bytes, so
that compression neither does everything nor nothing. SQLite and a directory as blob store. Seconds are wall-clock;
`cpu` is this process's; `longest_pause` is the longest time that the event loop did not turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions.snapshots import SnapshotStore
from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_directory
from claude_wrapper.storage.schema import metadata
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys

ORG, SESSION = "org_bench", "sesn_bench"
UUID = "11111111-2222-4333-8444-555555555555"
_WORDS = [f"{first}{second}" for first in "abcdefghij" for second in ("lpha", "eta", "amma", "elta", "psilon")]


def make_workspace(work: Path, megabytes: int) -> int:
    """Fill a workspace; how many files it has."""
    chance, count = random.Random(7), 0
    text = " ".join(chance.choice(_WORDS) for _ in range(200_000)).encode()
    for _ in range(megabytes * 1_000_000 * 2 // 3 // 8_000):
        path = work / f"src/d{count % 97}/m{count}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        start = chance.randrange(len(text) - 8_000)
        path.write_bytes(b"%d\n" % count + text[start : start + 8_000])
        count += 1
    for number in range(4):
        size = megabytes * 1_000_000 // 12
        with (work / f"large{number}.bin").open("wb") as file:
            while size > 0:
                size -= file.write(os.urandom(min(size, 1 << 22)))
        count += 1
    return count


async def _watch(pauses: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        pauses.append(time.perf_counter() - before - 0.005)


async def measured(work: Callable[[], Awaitable[Any]]) -> tuple[Any, dict[str, float]]:
    pauses: list[float] = []
    watching = asyncio.ensure_future(_watch(pauses))
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        result = await work()
    finally:
        watching.cancel()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return result, {
        "seconds": round(seconds, 3),
        "cpu": round(cpu, 3),
        "longest_pause": round(max(pauses, default=0.0), 3),
    }


async def one_size(root: Path, megabytes: int) -> dict[str, Any]:
    home, work = root / "home", root / "work"
    (home / ".claude/projects/-work").mkdir(parents=True)
    (home / ".claude/projects/-work/t.jsonl").write_bytes(b'{"type":"user","message":"some words"}\n' * 20_000)
    work.mkdir()
    files = make_workspace(work, megabytes)
    await asyncio.sleep(2.5)  # a file that was written just before the scan is read once more
    db = Database(f"sqlite:///{root / 'bench.db'}")
    try:
        await _create(db)
        clock = SystemClock()
        keys = OrgKeys(db, LocalMasterKey([KeyMaterial(b"b" * 32)]), clock)
        store = SnapshotStore(db, open_directory(root / "blobs"), keys, clock, RandomIds())

        async def save() -> Any:
            return await store.save(ORG, SESSION, home, work, cli_uuid=UUID)

        found: dict[str, Any] = {"megabytes": megabytes, "files": files}
        first, figures = await measured(save)
        found["bytes"] = first.bytes_logical
        found["first_save"] = figures | {"bytes_written": first.bytes_written}
        same, figures = await measured(save)
        found["unchanged_save"] = figures | {"bytes_written": same.bytes_written, "bytes_read": same.bytes_read}
        (work / "src/d1/m1.py").write_bytes(os.urandom(8_000))
        changed, figures = await measured(save)
        found["one_file_save"] = figures | {"bytes_written": changed.bytes_written, "bytes_read": changed.bytes_read}
        back, figures = await measured(lambda: store.restore(ORG, SESSION, root / "back"))
        assert back is not None
        found["restore"] = figures
        fresh, figures = await measured(
            lambda: store.save(ORG, SESSION, root / "back/home", root / "back/work", cli_uuid=UUID)
        )
        found["save_after_restore"] = figures | {"bytes_written": fresh.bytes_written, "bytes_read": fresh.bytes_read}
        copied, figures = await measured(
            lambda: asyncio.to_thread(shutil.copytree, root / "back/work", root / "copy", symlinks=True)
        )
        found["floor_copytree"] = figures
        found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        del copied
        return found
    finally:
        await db.close(grace=5)


async def _create(db: Database) -> None:
    from claude_wrapper.storage.tables.tenancy import organizations

    async with db.transaction() as tx:
        await tx.run_sync(metadata.create_all)
        row: dict[str, Any] = {}
        for column in organizations.c:
            if not column.nullable and column.server_default is None:
                row[column.name] = (
                    datetime.now(UTC) if column.name.endswith("_at") else {} if "JSON" in str(column.type) else ORG
                )
        await tx.execute(sa.insert(organizations).values(**row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    results = {}
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(prefix="cw-bench-snapshots-", dir=options.directory) as name:
            results[f"{megabytes} MB"] = asyncio.run(one_size(Path(name), megabytes))
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
