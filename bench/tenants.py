"""What it costs to know who asks. Prints one JSON object.

    python bench/tenants.py [--orgs 1000] [--keys 10000]

* start: seconds from settings to keys, vault, limits and ledger running, over a database with that many organisations and
  keys, beside an empty one (best of three).
* authenticate + admit per request, in microseconds: 500 keys once (cold: the key's and its organisation's limits are read), then known ones, without
  limits and with a rate and a monthly budget per organisation.
* memory: resident bytes after the start, and after every key has been seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from claude_wrapper.app.tenants import Tenants, running_tenants
from claude_wrapper.clock import SystemClock
from claude_wrapper.config import Settings
from claude_wrapper.ids import RandomIds
from claude_wrapper.storage.tables.limits import budgets
from claude_wrapper.storage.tables.tenancy import api_keys, organizations, workspaces
from claude_wrapper.telemetry.logs import configure
from claude_wrapper.tenancy.keyformat import Pepper, mint

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_PEPPER = "a pepper for the benchmark only"
_ROUNDS = 20_000
_COLD = 500


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orgs", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=10_000)
    options = parser.parse_args()
    configure("error", "json")
    found: dict[str, Any] = {"organisations": options.orgs, "keys": options.keys}
    with tempfile.TemporaryDirectory() as name:
        empty, full = Path(name) / "empty", Path(name) / "full"
        found["start_empty_seconds"] = await best_start(empty)
        await best_start(full)
        secrets = await fill(full, options.orgs, options.keys)
        found["start_seconds"] = await best_start(full)
        async with running(full) as tenants:
            before = resident()
            some = min(len(secrets), _COLD)
            found["cold_us"] = await per_request(tenants, secrets[:some], some)
            for at in range(some, len(secrets), 64):
                await asyncio.gather(*(tenants.keyring.authenticate(one) for one in secrets[at : at + 64]))
            found["resident_mb"] = round(before / 2**20, 1)
            found["bytes_per_known_key"] = round((resident() - before) / len(secrets))
            hot = secrets[:100]
            found["warm_us"] = await per_request(tenants, hot, _ROUNDS)
            found["authenticate_us"] = await authenticate_only(tenants, hot, _ROUNDS)
            await cap(tenants, options.orgs)
        async with running(full, key_limits="requests=1000000/minute") as tenants:
            await per_request(tenants, hot, len(hot))
            found["warm_with_rate_and_budget_us"] = await per_request(tenants, hot, _ROUNDS)
    print(json.dumps(found, indent=2))


def running(directory: Path, **more: Any) -> Any:
    directory.mkdir(exist_ok=True)
    return running_tenants(
        Settings(data_dir=directory, key_pepper=_PEPPER, **more), directory, SystemClock(), RandomIds()
    )


async def best_start(directory: Path) -> float:
    took = []
    for _ in range(4):  # the first one makes the tables
        began = time.perf_counter()
        async with running(directory):
            took.append(time.perf_counter() - began)
    return round(min(took[1:]), 4)


async def fill(directory: Path, orgs: int, keys: int) -> list[str]:
    """That many organisations and keys, written in one transaction; the keys' secrets."""
    ids, pepper = RandomIds(), Pepper(_PEPPER.encode())
    names = [ids.new("org") for _ in range(orgs)]
    minted = [mint(ids.new("apikey"), pepper) for _ in range(keys)]
    async with running(directory) as tenants, tenants.database.transaction() as tx:
        await tx.execute(sa.insert(organizations), [{"id": one, "name": one, "created_at": _NOW} for one in names])
        spaces = [
            {
                "id": ids.new("wrkspc"),
                "org_id": one,
                "name": "Default",
                "is_default": True,
                "created_at": _NOW,
                "tags": {},
            }
            for one in names
        ]
        await tx.execute(sa.insert(workspaces), spaces)
        rows = [
            {
                "id": one.id,
                "org_id": names[number % orgs],
                "name": "key",
                "digest": one.digest,
                "hint": one.hint,
                "role": "developer",
                "created_at": _NOW,
            }
            for number, one in enumerate(minted)
        ]
        await tx.execute(sa.insert(api_keys), rows)
    return [one.secret for one in minted]


async def cap(tenants: Tenants, orgs: int) -> None:
    """A monthly budget for every organisation."""
    ids = RandomIds()
    async with tenants.database.transaction() as tx:
        found = (await tx.execute(sa.select(organizations.c.id).limit(orgs + 1))).scalars().all()
        rows = [
            {
                "id": ids.new("spl"),
                "org_id": one,
                "scope": "organization",
                "subject_id": one,
                "period": "month",
                "cap_micros": 50_000_000,
                "action": "block",
                "alert_percents": [80, 100],
                "created_at": _NOW,
                "updated_at": _NOW,
            }
            for one in found
        ]
        await tx.execute(sa.insert(budgets), rows)


async def per_request(tenants: Tenants, secrets: list[str], times: int) -> float:
    began = time.perf_counter()
    for number in range(times):
        principal = await tenants.keyring.authenticate(secrets[number % len(secrets)])
        async with tenants.admission.admit(principal):
            pass
    return round((time.perf_counter() - began) / times * 1e6, 1)


async def authenticate_only(tenants: Tenants, secrets: list[str], times: int) -> float:
    began = time.perf_counter()
    for number in range(times):
        await tenants.keyring.authenticate(secrets[number % len(secrets)])
    return round((time.perf_counter() - began) / times * 1e6, 1)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    asyncio.run(main())
