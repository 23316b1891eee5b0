"""An organisation's own hosts come from its settings, and a change is in force after some seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from claude_wrapper.app.orgsettings import KEPT_SECONDS, OrgSettings
from claude_wrapper.storage import migrations
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.testing.clock import ManualClock

pytestmark = pytest.mark.anyio


async def test_a_change_is_seen_after_some_seconds_and_each_organisation_has_its_own(tmp_path: Path) -> None:
    clock = ManualClock()
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/db.sqlite", clock=clock)
    try:
        await migrations.prepare(database)
        async with database.transaction() as tx:
            for org, hosts in (("org_a", ["a.example"]), ("org_b", "not a list")):
                await tx.execute(
                    sa.insert(organizations).values(
                        id=org, name=org, is_staff=False, created_at=clock.now(), settings={"egress_hosts": hosts}
                    )
                )
        hosts_of = OrgSettings(database, clock).egress_hosts
        assert [await hosts_of("org_a"), await hosts_of("org_b"), await hosts_of("org_c")] == [("a.example",), (), ()]

        async with database.transaction() as tx:
            await tx.execute(
                sa.update(organizations)
                .where(organizations.c.id == "org_a")
                .values(settings={"egress_hosts": [5, "b"]})
            )
        assert await hosts_of("org_a") == ("a.example",)
        await clock.advance(KEPT_SECONDS)
        assert await hosts_of("org_a") == ("b",)
    finally:
        await database.close()
