"""Organisations, workspaces, people, invites: changes, refusals, the audit log, deletion."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from claude_wrapper.errors import AuthenticationFailed, Conflict, InvalidRequest, NotFound, PermissionDenied
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.tenancy import (
    apikeys,
    audit,
    bootstrap,
    deletion,
    idempotency,
    invites,
    members,
    orgs,
    users,
    workspaces,
)
from claude_wrapper.tenancy.invites import InviteStatus
from claude_wrapper.tenancy.keyrecords import KeySpec
from claude_wrapper.tenancy.keyring import KeyRing
from claude_wrapper.tenancy.orgs import OrganizationChange
from claude_wrapper.tenancy.principal import user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.tenancy.workspaces import WorkspaceChange
from databases import scalar
from tenants import PEPPER, World

pytestmark = pytest.mark.anyio


async def join(world: World, email: str, role: Role) -> users.User:
    found: users.User = await world.do(users.add_user, world.ours, email=email, role=role)
    return found


# Organisations --------------------------------------------------------------------------------------------------------


async def test_only_the_operator_makes_and_lists_organisations(world: World) -> None:
    with pytest.raises(PermissionDenied):
        await world.do(orgs.create_organization, world.ours, "Mine")
    with pytest.raises(PermissionDenied):
        await world.see(orgs.list_organizations, world.ours, PageRequest())
    page = await world.see(orgs.list_organizations, world.operator, PageRequest())
    assert {org.name for org in page.data} == {"Ours", "Theirs"}


async def test_a_new_organisation_has_a_default_workspace(world: World) -> None:
    workspace = await world.see(workspaces.default_workspace, world.ours)
    assert workspace.is_default
    with pytest.raises(Conflict, match="default"):
        await world.do(workspaces.archive_workspace, world.ours, workspace.id)


async def test_settings_are_merged_and_null_removes(world: World) -> None:
    await world.do(orgs.update_organization, world.ours, OrganizationChange(settings={"a": 1, "b": 2}))
    org = await world.do(orgs.update_organization, world.ours, OrganizationChange(settings={"a": None, "c": 3}))
    assert org.settings == {"b": 2, "c": 3}


async def test_two_admins_who_edit_the_organisation_at_once_meet_a_conflict(world: World) -> None:
    org = await world.see(orgs.get_organization, world.ours)
    change = OrganizationChange(name="A", expected_version=org.version)
    results = await asyncio.gather(
        world.do(orgs.update_organization, world.ours, change),
        world.do(orgs.update_organization, world.ours, replace(change, name="B")),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "Organization"]


async def test_an_owner_cannot_make_the_organisation_staff(world: World) -> None:
    with pytest.raises(PermissionDenied, match="operator"):
        await world.do(orgs.update_organization, world.ours, OrganizationChange(is_staff=True))
    inside = world.operator.acting_in(world.ours.org)
    assert (await world.do(orgs.update_organization, inside, OrganizationChange(is_staff=True))).is_staff


# Workspaces and their members -----------------------------------------------------------------------------------------


async def test_workspaces_are_listed_with_the_filters_of_the_wire(world: World) -> None:
    made = [await world.do(workspaces.create_workspace, world.ours, f"W{n}") for n in range(3)]
    await world.do(workspaces.archive_workspace, world.ours, made[0].id)

    async def listed(**kw: Any) -> set[str]:
        return {
            found.name for found in (await world.see(workspaces.list_workspaces, world.ours, PageRequest(), **kw)).data
        }

    assert await listed() == {"Default", "W1", "W2"}
    assert await listed(include_archived=True, include_default=False) == {"W0", "W1", "W2"}
    assert await listed(only=[made[1].id, "wrkspc_other"]) == {"W1"}
    with pytest.raises(InvalidRequest, match=r"^ids"):
        await listed(only=["x"] * 101)


async def test_tags_are_merged_and_bounded(world: World) -> None:
    workspace = await world.do(workspaces.create_workspace, world.ours, "W", tags={"a": "1", "b": "2"})
    change = WorkspaceChange(tags={"a": None, "c": "3"})
    assert (await world.do(workspaces.update_workspace, world.ours, workspace.id, change)).tags == {"b": "2", "c": "3"}
    with pytest.raises(InvalidRequest, match="tags"):
        await world.do(workspaces.create_workspace, world.ours, "W", tags={"anthropic-x": "1"})
    with pytest.raises(InvalidRequest, match="display_color"):
        await world.do(workspaces.create_workspace, world.ours, "W", display_color="red")


async def test_a_workspace_role_adds_to_what_a_persons_key_may_do_there(world: World) -> None:
    person = await join(world, "p@example.com", Role.VIEWER)
    workspace = await world.do(workspaces.create_workspace, world.ours, "W")
    spec = KeySpec("p", role=Role.DEVELOPER, user_id=person.id, workspace_id=workspace.id)
    made = await world.do(apikeys.create_api_key, world.ours, PEPPER, spec)
    keys = KeyRing(world.db, PEPPER, world.clock)
    assert not (await keys.authenticate(made.secret)).may("write:messages")
    args = (workspace.id,)
    await world.do(members.add_member, world.ours, *args, user_id=person.id, role=Role.DEVELOPER)
    keys.heard(None)
    assert (await keys.authenticate(made.secret)).may("write:messages")
    await world.do(members.update_member, world.ours, *args, user_id=person.id, role=Role.BILLING)
    keys.heard(None)
    assert not (await keys.authenticate(made.secret)).may("write:messages")
    with pytest.raises(Conflict):
        await world.do(members.add_member, world.ours, *args, user_id=person.id, role=Role.VIEWER)
    assert len((await world.see(members.list_members, world.ours, workspace.id, PageRequest())).data) == 1
    await world.do(members.remove_member, world.ours, *args, user_id=person.id)
    with pytest.raises(NotFound):
        await world.see(members.get_member, world.ours, workspace.id, person.id)


async def test_somebody_who_is_not_in_the_organisation_cannot_be_in_its_workspace(world: World) -> None:
    workspace = await world.do(workspaces.create_workspace, world.ours, "W")
    stranger = await world.do(users.add_user, world.theirs, email="s@example.com", role=Role.VIEWER)
    with pytest.raises(NotFound, match=stranger.id):
        await world.do(members.add_member, world.ours, workspace.id, user_id=stranger.id, role=Role.VIEWER)


# People ---------------------------------------------------------------------------------------------------------------


async def test_one_person_may_be_in_two_organisations_with_different_roles(world: World) -> None:
    here = await join(world, "P@Example.com ", Role.ADMIN)
    there = await world.do(users.add_user, world.theirs, email="p@example.com", role=Role.VIEWER)
    assert here.id == there.id
    assert (here.role, there.role) == (Role.ADMIN, Role.VIEWER)
    with pytest.raises(Conflict, match="already"):
        await join(world, "p@example.com", Role.VIEWER)


async def test_the_last_owner_stays_one(world: World) -> None:
    first = await join(world, "a@example.com", Role.OWNER)
    with pytest.raises(Conflict, match="at least one owner"):
        await world.do(users.update_user, world.ours, first.id, role=Role.ADMIN)
    with pytest.raises(Conflict, match="at least one owner"):
        await world.do(users.remove_user, world.ours, first.id)
    await join(world, "b@example.com", Role.OWNER)
    assert (await world.do(users.update_user, world.ours, first.id, role=Role.ADMIN)).role is Role.ADMIN


async def test_an_admin_can_neither_make_nor_unmake_an_owner(world: World) -> None:
    first, second = [await join(world, f"{n}@example.com", role) for n, role in ((1, Role.OWNER), (2, Role.VIEWER))]
    await join(world, "3@example.com", Role.OWNER)
    admin = world.as_role(Role.ADMIN)
    for attempt in (
        world.do(users.update_user, admin, second.id, role=Role.OWNER),
        world.do(users.update_user, admin, first.id, role=Role.VIEWER),
        world.do(users.remove_user, admin, first.id),
        world.do(users.add_user, admin, email="x@example.com", role=Role.OWNER),
        world.do(invites.create_invite, admin, email="x@example.com", role=Role.OWNER),
    ):
        with pytest.raises(PermissionDenied):
            await attempt


async def test_who_leaves_takes_their_keys_along(world: World) -> None:
    person = await join(world, "p@example.com", Role.DEVELOPER)
    made = await world.do(apikeys.create_api_key, world.ours, PEPPER, KeySpec("p", user_id=person.id))
    keys = KeyRing(world.db, PEPPER, world.clock)
    assert (await keys.authenticate(made.secret)).user_id == person.id
    await world.do(users.remove_user, world.ours, person.id)
    keys.heard(None)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(made.secret)


async def test_people_are_listed_by_address_and_role(world: World) -> None:
    for n, role in enumerate((Role.OWNER, Role.ADMIN, Role.ADMIN)):
        await join(world, f"{n}@example.com", role)

    async def listed(**kw: Any) -> list[str]:
        return sorted(u.email for u in (await world.see(users.list_users, world.ours, PageRequest(), **kw)).data)

    assert await listed(email="1@EXAMPLE.com") == ["1@example.com"]
    assert await listed(roles=[Role.ADMIN]) == ["1@example.com", "2@example.com"]
    assert (await world.see(users.list_users, world.theirs, PageRequest())).data == ()


# Invites --------------------------------------------------------------------------------------------------------------


async def test_an_invite_makes_a_member_once(world: World) -> None:
    made = await world.do(invites.create_invite, world.ours, email="N@example.com", role=Role.DEVELOPER)
    assert made.token not in repr(made)
    async with world.db.transaction() as tx:
        org, user_id = await invites.accept_invite(tx, world.scribe, made.token, name="New")
    assert org == world.ours.org
    member = await world.see(users.get_user, world.ours, user_id)
    assert (member.email, member.name, member.role) == ("n@example.com", "New", Role.DEVELOPER)
    with pytest.raises(NotFound):
        await _accept(world, made.token)
    seen = await world.see(invites.get_invite, world.ours, made.invite.id, now=world.clock.now())
    assert seen.status is InviteStatus.ACCEPTED
    with pytest.raises(Conflict, match="accepted"):
        await world.do(invites.delete_invite, world.ours, made.invite.id)


async def _accept(world: World, token: str) -> tuple[str, str]:
    async with world.db.transaction() as tx:
        return await invites.accept_invite(tx, world.scribe, token)


async def test_of_several_that_accept_one_invite_exactly_one_does(world: World) -> None:
    made = await world.do(invites.create_invite, world.ours, email="n@example.com", role=Role.VIEWER)
    results = await asyncio.gather(*(_accept(world, made.token) for _ in range(5)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NotFound"] * 4 + ["tuple"]


async def test_an_invite_that_expired_or_was_withdrawn_is_worth_nothing(world: World) -> None:
    old = await world.do(invites.create_invite, world.ours, email="a@example.com", role=Role.VIEWER)
    with pytest.raises(Conflict, match="pending"):
        await world.do(invites.create_invite, world.ours, email="a@example.com", role=Role.VIEWER)
    world.clock.advance(timedelta(days=22).total_seconds())
    withdrawn = await world.do(invites.create_invite, world.ours, email="a@example.com", role=Role.VIEWER)
    await world.do(invites.delete_invite, world.ours, withdrawn.invite.id)
    for token in (old.token, withdrawn.token, "nonsense"):
        with pytest.raises(NotFound):
            await _accept(world, token)

    async def listed(*statuses: InviteStatus) -> list[str]:
        page = await world.see(
            invites.list_invites, world.ours, PageRequest(), now=world.clock.now(), statuses=statuses or None
        )
        return [invite.id for invite in page.data]

    assert await listed() == await listed(InviteStatus.EXPIRED) == [old.invite.id]
    assert await listed(InviteStatus.DELETED) == [withdrawn.invite.id]


# Audit ----------------------------------------------------------------------------------------------------------------


async def test_every_change_writes_one_entry_that_says_who_what_and_from_where(world: World) -> None:
    await world.do(orgs.update_organization, world.ours, OrganizationChange(name="Ours & Co"))
    page = await world.see(audit.list_audit_entries, world.ours, PageRequest(limit=1))
    entry = page.data[0]
    assert (entry.action, entry.target_kind, entry.target_id) == ("organization.update", "organization", world.ours.org)
    assert (entry.actor_kind, entry.actor_id) == ("user", "user_owner")
    assert (entry.before, entry.after) == ({"name": "Ours"}, {"name": "Ours & Co"})
    assert entry.origin.address == "203.0.113.9"


async def test_a_change_that_fails_leaves_no_entry_and_an_entry_that_fails_no_change(world: World) -> None:
    before = await scalar(world.db, "SELECT count(*) FROM audit_log")
    with pytest.raises(InvalidRequest):
        await world.do(workspaces.create_workspace, world.ours, "")

    async def broken(*args: Any, **kw: Any) -> None:
        raise RuntimeError("no entry")

    class BrokenScribe(audit.Scribe):
        record = broken

    scribe = BrokenScribe(world.clock, world.scribe.ids)
    with pytest.raises(RuntimeError):
        await replace(world, scribe=scribe).do(workspaces.create_workspace, world.ours, "W")
    assert await scalar(world.db, "SELECT count(*) FROM audit_log") == before
    assert await scalar(world.db, "SELECT count(*) FROM workspaces WHERE name = 'W'") == 0


async def test_the_audit_log_is_read_by_those_with_the_scope_and_for_their_own_organisation(world: World) -> None:
    await world.do(workspaces.create_workspace, world.ours, "W")
    theirs = await world.see(audit.list_audit_entries, world.theirs, PageRequest())
    assert {entry.org_id for entry in theirs.data} == {world.theirs.org}
    with pytest.raises(PermissionDenied, match="read:audit"):
        await world.see(audit.list_audit_entries, world.as_role(Role.DEVELOPER), PageRequest())
    only = await world.see(audit.list_audit_entries, world.ours, PageRequest(), action="workspace.create")
    assert [entry.action for entry in only.data] == ["workspace.create"]


CHANGES: list[tuple[str, Callable[..., Awaitable[Any]], dict[str, Any]]] = [
    ("workspace.create", workspaces.create_workspace, {"name": "W"}),
    ("user.add", users.add_user, {"email": "x@example.com", "role": Role.VIEWER}),
    ("invite.create", invites.create_invite, {"email": "y@example.com", "role": Role.VIEWER}),
    ("organization.update", orgs.update_organization, {"change": OrganizationChange(name="N")}),
    ("api_key.create", apikeys.create_api_key, {"pepper": PEPPER, "spec": KeySpec("k")}),
    ("organization.delete", deletion.delete_organization, {}),
]


@pytest.mark.parametrize(("action", "function", "kw"), CHANGES, ids=[change[0] for change in CHANGES])
async def test_each_kind_of_change_is_one_entry_without_a_secret(
    world: World, action: str, function: Callable[..., Awaitable[Any]], kw: dict[str, Any]
) -> None:
    count = await scalar(world.db, "SELECT count(*) FROM audit_log")
    await world.do(function, world.ours, **kw)
    assert await scalar(world.db, "SELECT count(*) FROM audit_log") == count + 1
    entry = (await world.see(audit.list_audit_entries, world.ours, PageRequest(limit=1))).data[0]
    assert entry.action == action
    assert "sk-cw-" not in repr(entry)


# Others' things -------------------------------------------------------------------------------------------------------


async def test_nothing_of_another_organisation_exists_for_us(world: World) -> None:
    workspace = await world.do(workspaces.create_workspace, world.theirs, "W")
    person = await world.do(users.add_user, world.theirs, email="t@example.com", role=Role.VIEWER)
    invite = (await world.do(invites.create_invite, world.theirs, email="i@example.com", role=Role.VIEWER)).invite
    await world.do(members.add_member, world.theirs, workspace.id, user_id=person.id, role=Role.VIEWER)
    now = world.clock.now()
    reads = [
        (workspaces.get_workspace, (workspace.id,), {}),
        (users.get_user, (person.id,), {}),
        (invites.get_invite, (invite.id,), {"now": now}),
        (members.list_members, (workspace.id, PageRequest()), {}),
        (members.get_member, (workspace.id, person.id), {}),
    ]
    writes = [
        (workspaces.update_workspace, (workspace.id, WorkspaceChange(name="x")), {}),
        (workspaces.archive_workspace, (workspace.id,), {}),
        (users.update_user, (person.id,), {"role": Role.ADMIN}),
        (users.remove_user, (person.id,), {}),
        (invites.delete_invite, (invite.id,), {}),
        (members.add_member, (workspace.id,), {"user_id": person.id, "role": Role.VIEWER}),
        (members.update_member, (workspace.id,), {"user_id": person.id, "role": Role.ADMIN}),
        (members.remove_member, (workspace.id,), {"user_id": person.id}),
        (apikeys.create_api_key, (PEPPER, KeySpec("k", workspace_id=workspace.id)), {}),
        (apikeys.create_api_key, (PEPPER, KeySpec("k", user_id=person.id)), {}),
    ]
    for function, args, kw in reads:
        with pytest.raises(NotFound):
            await world.see(function, world.ours, *args, **kw)
    for function, args, kw in writes:
        with pytest.raises(NotFound):
            await world.do(function, world.ours, *args, **kw)
    with pytest.raises(InvalidRequest, match="after_id"):
        await world.see(workspaces.list_workspaces, world.ours, PageRequest(after_id=workspace.id))


# Deletion -------------------------------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """An eraser that counts, and fails as often as it is told."""

    name: str
    things: dict[str, int]
    failures: int = 0
    erased: list[str] = field(default_factory=list)

    async def erase(self, org: str) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError("the disk is away")
        self.erased.append(org)
        return self.things.pop(org, 0)


async def test_a_deleted_organisation_loses_access_at_once_and_a_restored_one_has_it_again(world: World) -> None:
    made = await world.do(apikeys.create_api_key, world.ours, PEPPER, KeySpec("k"))
    keys = KeyRing(world.db, PEPPER, world.clock)

    async def listen(announcements: Any) -> None:
        for announcement in announcements:
            keys.heard(announcement.payload)

    world.db.listener = listen
    await keys.authenticate(made.secret)
    await world.do(deletion.delete_organization, world.ours)
    with pytest.raises(AuthenticationFailed, match="deleted"):
        await keys.authenticate(made.secret)
    with pytest.raises(PermissionDenied):
        await world.do(deletion.restore_organization, world.ours)
    inside = world.operator.acting_in(world.ours.org)
    await world.do(deletion.restore_organization, inside)
    assert (await keys.authenticate(made.secret)).org == world.ours.org


async def test_an_admin_cannot_delete_the_organisation(world: World) -> None:
    with pytest.raises(PermissionDenied, match="delete:organization"):
        await world.do(deletion.delete_organization, world.as_role(Role.ADMIN))


async def test_a_purge_erases_everything_of_one_organisation_says_what_and_leaves_the_other(world: World) -> None:
    for principal in (world.ours, world.theirs):
        workspace = await world.do(workspaces.create_workspace, principal, "W")
        both = await world.do(users.add_user, principal, email="both@example.com", role=Role.OWNER)
        alone = f"{principal.org}@example.com"
        await world.do(users.add_user, principal, email=alone, role=Role.VIEWER)
        await world.do(members.add_member, principal, workspace.id, user_id=both.id, role=Role.ADMIN)
        await world.do(apikeys.create_api_key, principal, PEPPER, KeySpec("k", workspace_id=workspace.id))
        await world.do(invites.create_invite, principal, email="i@example.com", role=Role.VIEWER)
    inside, disk = world.operator.acting_in(world.ours.org), Shelf("workspaces on disk", {world.ours.org: 3})
    with pytest.raises(Conflict, match="delete the organisation first"):
        await deletion.purge_organization(world.db, inside, world.scribe, [disk])
    await world.do(deletion.delete_organization, world.ours)
    report = await deletion.purge_organization(world.db, inside, world.scribe, [disk, Shelf("snapshots", {})])
    assert report.erased == {
        "workspaces on disk": 3,
        "snapshots": 0,
        "organizations": 1,
        "workspaces": 2,
        "workspace_members": 1,
        "org_members": 2,
        "users": 1,
        "api_keys": 1,
        "invites": 1,
    }
    assert "audit_log" in report.kept
    for table in ("organizations", "workspaces", "org_members", "workspace_members", "api_keys", "invites"):
        column = "id" if table == "organizations" else "org_id"
        ours = await scalar(world.db, f"SELECT count(*) FROM {table} WHERE {column} = :org", org=world.ours.org)
        theirs = await scalar(world.db, f"SELECT count(*) FROM {table} WHERE {column} = :org", org=world.theirs.org)
        assert ours == 0, table
        assert theirs > 0, table
    assert await scalar(world.db, "SELECT count(*) FROM users WHERE email = 'both@example.com'") == 1
    entries = await world.see(audit.list_audit_entries, inside, PageRequest(), action="organization.purge")
    assert len(entries.data) == 1


async def test_a_purge_that_fails_half_way_can_be_run_again(world: World) -> None:
    await world.do(deletion.delete_organization, world.ours)
    inside = world.operator.acting_in(world.ours.org)
    first, second = Shelf("credentials", {world.ours.org: 1}), Shelf("snapshots", {world.ours.org: 2}, failures=1)
    with pytest.raises(OSError, match="away"):
        await deletion.purge_organization(world.db, inside, world.scribe, [first, second])
    assert (await world.see(orgs.get_organization, inside)).deleted_at is not None
    report = await deletion.purge_organization(world.db, inside, world.scribe, [first, second])
    assert (report.erased["credentials"], report.erased["snapshots"]) == (0, 2)


async def test_only_the_operator_purges(world: World) -> None:
    await world.do(deletion.delete_organization, world.ours)
    with pytest.raises(PermissionDenied):
        await deletion.purge_organization(world.db, world.ours, world.scribe, [])


# Bootstrap ------------------------------------------------------------------------------------------------------------


async def test_the_operator_is_made_once_and_its_key_may_do_everything_in_every_organisation(world: World) -> None:
    async with world.db.transaction() as tx:
        first = await bootstrap.ensure_operator(tx, world.scribe, PEPPER)
    async with world.db.transaction() as tx:
        second = await bootstrap.ensure_operator(tx, world.scribe, PEPPER)
    assert first.secret is not None
    assert (second.secret, second.key_id) == (None, first.key_id)
    assert first.organization.is_staff
    principal = await KeyRing(world.db, PEPPER, world.clock).authenticate(first.secret)
    assert principal.is_operator
    assert principal.is_staff
    page = await world.see(workspaces.list_workspaces, principal.acting_in(world.ours.org), PageRequest())
    assert len(page.data) == 1
    with pytest.raises(Conflict, match="belongs"):
        await world.do(deletion.delete_organization, principal)


async def test_an_operator_without_a_live_key_gets_one_in_the_same_organisation(world: World) -> None:
    async with world.db.transaction() as tx:
        first = await bootstrap.ensure_operator(tx, world.scribe, PEPPER)
    inside = world.operator.acting_in(first.organization.id)
    await world.do(apikeys.revoke_api_key, inside, first.key_id)
    async with world.db.transaction() as tx:
        second = await bootstrap.ensure_operator(tx, world.scribe, PEPPER)
    assert second.organization.id == first.organization.id
    assert second.secret is not None
    async with world.db.transaction() as tx:
        third = await bootstrap.ensure_operator(tx, world.scribe, PEPPER)
    assert (third.key_id, third.secret) == (second.key_id, None)


async def test_an_owner_cannot_touch_an_operators_key(world: World) -> None:
    inside = world.operator.acting_in(world.ours.org)
    made = await world.do(apikeys.create_operator_key, inside, PEPPER, name="op")
    for function, args in ((apikeys.revoke_api_key, ()), (apikeys.rotate_api_key, (PEPPER,))):
        kw = {"overlap": timedelta(0)} if args else {}
        with pytest.raises(PermissionDenied):
            await world.do(function, world.ours, *args, made.key.id, **kw)


# Idempotency ----------------------------------------------------------------------------------------------------------


async def create_once(world: World, key: str, body: bytes, ran: list[int]) -> idempotency.StoredAnswer:
    request = idempotency.fingerprint("POST", "/v1/x", body)
    async with world.db.transaction() as tx:
        stored = await idempotency.begin(tx, world.ours, world.scribe, key, request)
        if stored is not None:
            return stored
        ran.append(1)
        answer = idempotency.StoredAnswer(200, b"made %d" % len(ran))
        await idempotency.finish(tx, world.ours, key, answer)
        return answer


async def test_a_create_that_is_sent_many_times_at_once_happens_once(world: World) -> None:
    ran: list[int] = []
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(create_once(world, "k", b"{}", ran) for _ in range(8)))
    assert len(ran) == 1
    assert {answer.body for answer in answers} == {b"made 1"}


async def test_the_same_key_for_another_request_is_refused_and_it_is_free_again_after_a_day(world: World) -> None:
    ran: list[int] = []
    await create_once(world, "k", b"{}", ran)
    with pytest.raises(InvalidRequest, match="different request"):
        await create_once(world, "k", b"{1}", ran)
    world.clock.advance(86_400)
    assert (await create_once(world, "k", b"{1}", ran)).body == b"made 2"


async def test_keys_of_two_actors_do_not_meet(world: World) -> None:
    request = idempotency.fingerprint("POST", "/", b"")
    for principal in (world.ours, world.theirs, user_principal(world.ours.org, "user_other", Role.ADMIN)):
        assert await world.do(idempotency.begin, principal, "k", request) is None
