"""The official SDK's admin calls work by changing the base URL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import anthropic
import pytest
from admin_world import Admin
from anthropic import AsyncAnthropic

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sdk(admin: Admin) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=admin.server.url, api_key=admin.owner, max_retries=0) as client:
        yield client


async def test_the_organisation_of_the_key(sdk: AsyncAnthropic, admin: Admin) -> None:
    me = await sdk.beta.organization.retrieve()
    assert (me.id, me.name, me.type) == (admin.ours, "Ours", "organization")


async def test_api_keys_are_listed_page_by_page_read_renamed_and_revoked(sdk: AsyncAnthropic, admin: Admin) -> None:
    for number in range(5):
        await admin.post("/api_keys", {"name": f"key {number}"})
    names = [key.name async for key in sdk.beta.organization.api_keys.list(limit=2)]
    assert names == ["key 4", "key 3", "key 2", "key 1", "key 0", "owner"]
    first = (await sdk.beta.organization.api_keys.list(limit=1)).data[0]
    found = await sdk.beta.organization.api_keys.retrieve(first.id)
    assert found.status == "active"
    assert found.scope.type == "organization"
    assert found.partial_key_hint is not None
    changed = await sdk.beta.organization.api_keys.update(first.id, name="renamed", status="inactive")
    assert (changed.name, changed.status) == ("renamed", "inactive")
    assert [key.id async for key in sdk.beta.organization.api_keys.list(status="inactive")] == [first.id]
    gone = await sdk.beta.organization.api_keys.update(first.id, status="archived")
    assert gone.status == "archived"
    with pytest.raises(anthropic.NotFoundError):
        await sdk.beta.organization.api_keys.retrieve("apikey_unknown")


async def test_invites_become_users_whose_role_changes_and_who_leave(sdk: AsyncAnthropic, admin: Admin) -> None:
    made = await sdk.beta.organization.invites.create(email="Ann@Example.com", role="user")
    assert (made.status, made.role, made.email) == ("pending", "user", "ann@example.com")
    token = made.to_dict()["token"]
    assert [one.id async for one in sdk.beta.organization.invites.list(statuses=["pending"])] == [made.id]
    assert (await sdk.beta.organization.invites.retrieve(made.id)).id == made.id
    joined = await admin.post("/invites/accept", {"token": token, "name": "Ann"})
    assert joined.body["organization_id"] == admin.ours
    assert (await admin.post("/invites/accept", {"token": token})).status == 404
    user = (await sdk.beta.organization.users.list(email="ann@example.com")).data[0]
    assert (user.role, user.name, user.type) == ("user", "Ann", "user")
    assert (await sdk.beta.organization.users.update(user.id, role="developer")).role == "developer"
    assert [one.id async for one in sdk.beta.organization.users.list(roles=["developer"])] == [user.id]
    assert (await sdk.beta.organization.users.retrieve(user.id)).role == "developer"
    assert (await sdk.beta.organization.users.remove(user.id)).type == "user_deleted"
    assert [one.id async for one in sdk.beta.organization.users.list()] == []
    second = await sdk.beta.organization.invites.create(email="bob@example.com", role="billing")
    assert (await sdk.beta.organization.invites.delete(second.id)).type == "invite_deleted"


async def test_workspaces_and_their_members(sdk: AsyncAnthropic, admin: Admin) -> None:
    user = (await admin.post("/users", {"email": "ann@example.com", "role": "viewer"})).body["id"]
    spaces = sdk.beta.organization.workspaces
    made = await spaces.create(name="Research", tags={"team": "a"})
    assert made.tags == {"team": "a"}
    assert (await spaces.retrieve(made.id)).data_residency.workspace_geo == "us"
    assert (await spaces.update(made.id, name="Lab", tags={"team": None})).tags == {}
    assert {one.name async for one in spaces.list()} == {"Lab", "Default"}
    assert [one.name async for one in spaces.list(include_default=False)] == ["Lab"]
    assert [one.name async for one in spaces.list(ids=[made.id])] == ["Lab"]
    member = await spaces.members.add(made.id, user_id=user, workspace_role="workspace_developer")
    assert (member.workspace_role, member.type) == ("workspace_developer", "workspace_member")
    changed = await spaces.members.update(user, workspace_id=made.id, workspace_role="workspace_user")
    assert changed.workspace_role == "workspace_user"
    assert (await spaces.members.retrieve(user, workspace_id=made.id)).user_id == user
    assert [one.user_id async for one in spaces.members.list(made.id)] == [user]
    gone = await spaces.members.remove(user, workspace_id=made.id)
    assert gone.type == "workspace_member_deleted"
    assert (await spaces.archive(made.id)).archived_at is not None
    with pytest.raises(anthropic.ConflictError):
        await spaces.update(made.id, name="Again")


async def test_rate_limits_of_the_organisation_and_of_a_workspace(sdk: AsyncAnthropic, admin: Admin) -> None:
    assert [one async for one in sdk.beta.organization.rate_limits.list()] == []
    limits = {"requests": 50, "input_tokens": 400000, "concurrent_turns": 4}
    done = await admin.post(f"/limits/organization/{admin.ours}", {"limits": limits}, **admin.as_operator(admin.ours))
    assert done.status == 200, done.body
    (entry,) = [one async for one in sdk.beta.organization.rate_limits.list()]
    assert {one.type: one.value for one in entry.limits} == {
        "requests_per_minute": 50,
        "input_tokens_per_minute_cache_aware": 400000,
        "concurrent_turns": 4,
    }
    space = (await sdk.beta.organization.workspaces.create(name="Lab")).id
    rates = sdk.beta.organization.workspaces.rate_limits
    changed = await rates.update(entry.id, workspace_id=space, limits=[{"type": "requests_per_minute", "value": 10}])
    assert [(one.type, one.value, one.org_limit) for one in changed.limits] == [("requests_per_minute", 10, 50)]
    (inherited,) = [one async for one in rates.list(space, include_inherited=True)]
    assert {one.type: one.source.type for one in inherited.limits} == {
        "requests_per_minute": "workspace",
        "input_tokens_per_minute_cache_aware": "organization",
        "concurrent_turns": "organization",
    }
    cleared = await rates.update(entry.id, workspace_id=space, limits=[{"type": "requests_per_minute", "value": None}])
    assert cleared.limits == []
    with pytest.raises(anthropic.BadRequestError):
        await rates.update(entry.id, workspace_id=space, limits=[{"type": "tool_uses_per_second", "value": 1}])


async def test_spend_limits_are_set_replaced_listed_and_deleted(sdk: AsyncAnthropic, admin: Admin) -> None:
    limits = sdk.beta.organization.spend_limits
    made = await limits.set(amount="5000", scope={"type": "organization"}, period="monthly")
    assert (made.amount, made.currency, made.period, made.scope.type) == ("5000", "USD", "monthly", "organization")
    again = await limits.set(amount="2500", scope={"type": "organization"}, period="monthly")
    assert (again.id, again.amount) == (made.id, "2500")
    user = (await admin.post("/users", {"email": "ann@example.com", "role": "developer"})).body["id"]
    mine = await limits.set(amount="100", scope={"type": "user", "user_id": user}, period="daily")
    assert (await limits.retrieve(mine.id)).amount == "100"
    assert {one.id async for one in limits.list(limit=1)} == {made.id, mine.id}
    assert [one.id async for one in limits.list(scope_type=["user"])] == [mine.id]
    rows = [row async for row in limits.effective.list()]
    assert {(row.period, row.amount, row.source.type) for row in rows} == {
        ("daily", "100", "user"),
        ("monthly", "2500", "organization"),
    }
    assert rows[0].period_to_date_spend == "0"
    assert (await limits.delete(mine.id)).type == "spend_limit_deleted"
    with pytest.raises(anthropic.NotFoundError):
        await limits.set(amount="1", scope={"type": "workspace", "workspace_id": "wrkspc_unknown"})


async def test_usage_and_cost_reports(sdk: AsyncAnthropic, admin: Admin) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = today - timedelta(days=9)
    reports = sdk.beta.organization.analytics
    buckets = [one async for one in reports.usage_report.list(starting_at=start, bucket_width="1d", limit=4)]
    assert len(buckets) == 10
    assert all(one.results == [] for one in buckets)
    assert [one async for one in reports.cost_report.list(starting_at=start, bucket_width="1h")]
    rows = [one async for one in reports.usage.list(starting_at=start)]
    assert [(row.usage.requests, row.usage.total_tokens) for row in rows] == [(0, 0)]
    assert [one.cost.amount async for one in reports.cost.list(starting_at=start)] == ["0"]
