"""A save whose process kills itself at one step: `python killed_save.py ROOT STEP`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions.snapshots import SnapshotStore, packing, rows, store
from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_directory
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(root: Path, step: str) -> None:
    db = Database(f"sqlite:///{root / 't.db'}")
    blobs = open_directory(root / "blobs")
    keys = OrgKeys(db, LocalMasterKey([KeyMaterial(b"m" * 32)]), SystemClock())
    real_put, real_replace = blobs.put, rows.replace

    async def put(key: str, content: Any) -> None:
        wanted = {"first pack": "/packs/", "list of files": "/manifests/"}.get(step)
        await real_put(key, content)
        if wanted is not None and wanted in key:
            die()

    async def replace(*args: Any, **kw: Any) -> None:
        if step == "before the row":
            die()
        await real_replace(*args, **kw)
        if step == "after the row":
            die()

    async def guard(_tx: Any) -> None:
        if step == "in the transaction":
            die()

    blobs.put = put  # type: ignore[method-assign]
    rows.replace = replace
    if step == "scan":
        store.scan = die
    if step == "reading":
        packing.read_portion = die
    snapshots = SnapshotStore(db, blobs, keys, SystemClock(), RandomIds())
    await snapshots.save("org_ours", "sesn_one", root / "home", root / "work", cli_uuid="u", guard=guard)


asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
