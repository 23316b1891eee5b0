"""API keys from creation to revocation, and what each refusal says."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from claude_wrapper.errors import (
    AuthenticationFailed,
    ConfigurationError,
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StorageUnavailable,
)
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.tenancy import apikeys, workspaces
from claude_wrapper.tenancy.keyformat import Pepper, mint, parse
from claude_wrapper.tenancy.keyrecords import KeyChange, KeySpec, KeyStatus, NewApiKey
from claude_wrapper.tenancy.keyring import KeyRing, KeyRingSettings
from claude_wrapper.tenancy.scopes import Role, scopes_of
from tenants import PEPPER, CountingIds, World

pytestmark = pytest.mark.anyio


def ring(world: World, **settings: Any) -> KeyRing:
    found = KeyRing(world.db, PEPPER, world.clock, KeyRingSettings(**settings))

    async def listen(announcements: Any) -> None:
        for announcement in announcements:
            found.heard(announcement.payload)

    world.db.listener = listen
    return found


async def new_key(world: World, spec: KeySpec | None = None, **kw: Any) -> NewApiKey:
    found: NewApiKey = await world.do(
        apikeys.create_api_key, kw.get("principal", world.ours), PEPPER, spec or KeySpec("ci")
    )
    return found


async def test_a_new_key_authenticates_as_its_organisation_role_and_scopes(world: World) -> None:
    made = await new_key(world, KeySpec("ci", scopes=["write:messages"], allowed_models=["claude-*"]))
    principal = await ring(world).authenticate(made.secret)
    assert (principal.org, principal.key_id, principal.role) == (world.ours.org, made.key.id, Role.DEVELOPER)
    assert principal.scopes == {"write:messages"}
    assert principal.may_use("claude-opus-5")
    assert not principal.may_use("gpt-7")


async def test_the_secret_is_neither_stored_nor_shown_again(world: World) -> None:
    made = await new_key(world)
    assert made.secret not in repr(made)
    seen = await world.see(apikeys.get_api_key, world.ours, made.key.id, now=world.clock.now())
    assert seen.hint.endswith(made.secret[-4:])
    assert made.secret not in repr(seen)


@pytest.mark.parametrize(
    "presented", [None, "", "nonsense", "sk-ant-api03-x", "sk-cw-zzzz-" + "a" * 43, "sk-cw-ä-" + "a" * 43]
)
async def test_what_is_not_a_key_of_ours_is_refused(world: World, presented: str | None) -> None:
    with pytest.raises(AuthenticationFailed):
        await ring(world).authenticate(presented)


async def test_the_right_identifier_with_a_wrong_secret_is_refused_cached_or_not(world: World) -> None:
    made, keys = await new_key(world), ring(world)
    wrong = made.secret[:-1] + ("A" if made.secret[-1] != "A" else "B")
    with pytest.raises(AuthenticationFailed, match="not valid"):
        await keys.authenticate(wrong)
    await keys.authenticate(made.secret)
    with pytest.raises(AuthenticationFailed, match="not valid"):
        await keys.authenticate(wrong)


async def test_an_expired_key_is_refused_the_moment_it_expires_even_from_the_cache(world: World) -> None:
    made = await new_key(world, KeySpec("ci", expires_at=world.clock.now() + timedelta(seconds=10)))
    keys = ring(world)
    await keys.authenticate(made.secret)
    world.clock.advance(10)
    with pytest.raises(AuthenticationFailed, match="expired"):
        await keys.authenticate(made.secret)


async def test_a_revoked_key_is_refused_at_once_because_the_commit_is_announced(world: World) -> None:
    made, keys = await new_key(world), ring(world)
    await keys.authenticate(made.secret)
    await world.do(apikeys.revoke_api_key, world.ours, made.key.id)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(made.secret)


async def test_a_replica_that_missed_the_announcement_learns_of_a_revocation_within_the_ttl(world: World) -> None:
    made, keys = await new_key(world), ring(world, ttl=30)
    await keys.authenticate(made.secret)
    world.db.listener = None
    await world.do(apikeys.revoke_api_key, world.ours, made.key.id)
    await keys.authenticate(made.secret)
    world.clock.advance(30)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(made.secret)


async def test_a_key_that_is_made_after_it_was_asked_for_works_at_once(world: World) -> None:
    keys, guessed = ring(world), mint("apikey_1000", PEPPER).secret
    with pytest.raises(AuthenticationFailed):
        await keys.authenticate(guessed)
    later = replace(world, scribe=replace(world.scribe, ids=CountingIds(itertools.count(1000))))
    made = await new_key(later)
    assert made.key.id == "apikey_1000"
    assert (await keys.authenticate(made.secret)).key_id == made.key.id


async def test_known_keys_stay_good_for_the_grace_time_while_the_database_is_away(world: World) -> None:
    made, keys = await new_key(world), ring(world, ttl=30, grace=60)
    other = await new_key(world)
    await keys.authenticate(made.secret)
    await world.db.close()
    world.clock.advance(31)
    assert (await keys.authenticate(made.secret)).key_id == made.key.id
    with pytest.raises(StorageUnavailable):
        await keys.authenticate(other.secret)
    world.clock.advance(60)
    with pytest.raises(StorageUnavailable):
        await keys.authenticate(made.secret)


async def test_a_hundred_requests_with_one_unknown_key_ask_the_database_once(world: World) -> None:
    made, keys = await new_key(world), ring(world)
    reads = 0
    real = world.db.read

    def counted() -> Any:
        nonlocal reads
        reads += 1
        return real()

    world.db.read = counted  # type: ignore[method-assign]
    found = await asyncio.gather(*(keys.authenticate(made.secret) for _ in range(100)))
    assert {principal.key_id for principal in found} == {made.key.id}
    assert reads == 1


async def test_rotation_gives_a_second_key_and_the_old_one_ends_after_the_overlap(world: World) -> None:
    made, keys = await new_key(world, KeySpec("ci", scopes=["write:messages"])), ring(world)
    rotated = await world.do(apikeys.rotate_api_key, world.ours, PEPPER, made.key.id, overlap=timedelta(hours=1))
    assert rotated.key.replaces == made.key.id
    assert (await keys.authenticate(rotated.secret)).scopes == {"write:messages"}
    assert (await keys.authenticate(made.secret)).key_id == made.key.id
    world.clock.advance(3600)
    with pytest.raises(AuthenticationFailed, match="expired"):
        await keys.authenticate(made.secret)
    await keys.authenticate(rotated.secret)


async def test_nobody_can_make_a_key_that_can_do_more_than_they_can(world: World) -> None:
    developer = world.as_role(Role.DEVELOPER)
    with pytest.raises(PermissionDenied, match="you cannot give"):
        await new_key(world, KeySpec("x", role=Role.ADMIN), principal=developer)
    narrow = replace(developer, scopes=frozenset({"write:api_keys"}))
    with pytest.raises(PermissionDenied):
        await new_key(world, KeySpec("x"), principal=narrow)
    made = await new_key(world, KeySpec("x", scopes=["write:api_keys"]), principal=narrow)
    assert made.key.scopes == ("write:api_keys",)


@pytest.mark.parametrize("role", [Role.BILLING, Role.VIEWER])
async def test_roles_without_the_scope_cannot_touch_keys(world: World, role: Role) -> None:
    somebody = world.as_role(role)
    with pytest.raises(PermissionDenied, match="write:api_keys"):
        await new_key(world, KeySpec("x", role=role), principal=somebody)
    with pytest.raises(PermissionDenied, match="read:api_keys"):
        await world.see(apikeys.list_api_keys, somebody, PageRequest(), now=world.clock.now())


async def test_another_organisations_key_does_not_exist_for_us(world: World) -> None:
    made = await new_key(world)
    now = world.clock.now()
    with pytest.raises(NotFound):
        await world.see(apikeys.get_api_key, world.theirs, made.key.id, now=now)
    for function, args, kw in (
        (apikeys.revoke_api_key, (made.key.id,), {}),
        (apikeys.update_api_key, (made.key.id, KeyChange(name="x")), {}),
        (apikeys.rotate_api_key, (PEPPER, made.key.id), {"overlap": timedelta(0)}),
    ):
        with pytest.raises(NotFound):
            await world.do(function, world.theirs, *args, **kw)
    assert (await world.see(apikeys.list_api_keys, world.theirs, PageRequest(), now=now)).data == ()


async def test_a_key_of_a_workspace_sees_the_keys_of_that_workspace_alone(world: World) -> None:
    workspace = await world.do(workspaces.create_workspace, world.ours, "Team")
    inside = await new_key(world, KeySpec("inside", role=Role.ADMIN, workspace_id=workspace.id))
    outside = await new_key(world, KeySpec("outside"))
    principal = await ring(world).authenticate(inside.secret)
    page = await world.see(apikeys.list_api_keys, principal, PageRequest(), now=world.clock.now())
    assert [key.id for key in page.data] == [inside.key.id]
    with pytest.raises(NotFound):
        await world.see(apikeys.get_api_key, principal, outside.key.id, now=world.clock.now())
    assert (await new_key(world, KeySpec("child"), principal=principal)).key.workspace_id == workspace.id


async def test_archiving_a_workspace_ends_its_keys_at_once(world: World) -> None:
    workspace = await world.do(workspaces.create_workspace, world.ours, "Team")
    made, keys = await new_key(world, KeySpec("ci", workspace_id=workspace.id)), ring(world)
    await keys.authenticate(made.secret)
    await world.do(workspaces.archive_workspace, world.ours, workspace.id)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(made.secret)
    with pytest.raises(Conflict, match="archived"):
        await new_key(world, KeySpec("late", workspace_id=workspace.id))


async def test_two_admins_who_edit_one_key_at_once_meet_a_conflict(world: World) -> None:
    made = await new_key(world)
    change = KeyChange(name="first", expected_version=made.key.version)
    await world.do(apikeys.update_api_key, world.ours, made.key.id, change)
    with pytest.raises(Conflict, match="somebody else"):
        await world.do(apikeys.update_api_key, world.ours, made.key.id, replace(change, name="second"))


async def test_an_inactive_key_is_refused_and_works_again_when_active(world: World) -> None:
    made, keys = await new_key(world), ring(world)
    await world.do(apikeys.update_api_key, world.ours, made.key.id, KeyChange(status=KeyStatus.INACTIVE))
    with pytest.raises(AuthenticationFailed, match="inactive"):
        await keys.authenticate(made.secret)
    await world.do(apikeys.update_api_key, world.ours, made.key.id, KeyChange(status=KeyStatus.ACTIVE))
    await keys.authenticate(made.secret)


async def test_an_archived_key_cannot_be_changed_and_revoking_it_again_is_no_error(world: World) -> None:
    made = await new_key(world)
    await world.do(apikeys.revoke_api_key, world.ours, made.key.id)
    await world.do(apikeys.revoke_api_key, world.ours, made.key.id)
    with pytest.raises(Conflict, match="archived"):
        await world.do(apikeys.update_api_key, world.ours, made.key.id, KeyChange(status=KeyStatus.ACTIVE))


async def test_keys_are_listed_by_status_with_expired_ones_apart(world: World) -> None:
    live = await new_key(world)
    short = await new_key(world, KeySpec("short", expires_at=world.clock.now() + timedelta(seconds=1)))
    world.clock.advance(2)

    async def listed(status: KeyStatus) -> list[str]:
        page = await world.see(apikeys.list_api_keys, world.ours, PageRequest(), now=world.clock.now(), status=status)
        return [key.id for key in page.data]

    assert await listed(KeyStatus.ACTIVE) == [live.key.id]
    assert await listed(KeyStatus.EXPIRED) == [short.key.id]


async def test_last_use_is_written_in_batches_and_never_goes_back(world: World) -> None:
    made, keys = await new_key(world), ring(world)
    await keys.authenticate(made.secret)
    used = world.clock.now()
    assert await keys.save_last_used() == 1
    assert await keys.save_last_used() == 0
    await keys.authenticate(made.secret)
    world.clock.wall -= timedelta(hours=1)
    await keys.authenticate(made.secret)
    await keys.save_last_used()
    seen = await world.see(apikeys.get_api_key, world.ours, made.key.id, now=world.clock.now())
    assert seen.last_used_at == used


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (KeySpec(""), "name"),
        (KeySpec("a\x00b"), "name"),
        (KeySpec("x" * 201), "name"),
        (KeySpec("x", scopes=["fly:moon"]), "scopes"),
        (KeySpec("x", allowed_models=["a b"]), r"allowed_models\[0\]"),
        (KeySpec("x", limits={"requests_per_minute": -1}), "limits.requests_per_minute"),
        (KeySpec("x", limits={"Bad Name": 1}), "limits"),
    ],
)
async def test_bad_input_names_the_field(world: World, spec: KeySpec, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}"):
        await new_key(world, spec)


async def test_an_old_pepper_still_opens_old_keys(world: World) -> None:
    made = await new_key(world)
    changed = KeyRing(world.db, Pepper(b"another pepper of tests", (PEPPER.current,)), world.clock)
    assert (await changed.authenticate(made.secret)).key_id == made.key.id
    forgotten = KeyRing(world.db, Pepper(b"another pepper of tests"), world.clock)
    with pytest.raises(AuthenticationFailed):
        await forgotten.authenticate(made.secret)


def test_a_pepper_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="16 bytes"):
        Pepper(b"short")


def test_a_key_names_its_own_identifier_and_holds_256_random_bits() -> None:
    minted = mint("apikey_0123456789abcdefghjkmnpqrs", PEPPER)
    assert parse(minted.secret) == minted.id
    assert len(minted.secret) == len("sk-cw-") + 26 + 1 + 43
    assert len({mint(minted.id, PEPPER).secret for _ in range(100)}) == 100


async def test_a_developers_key_has_no_more_than_a_developers_scopes(world: World) -> None:
    made = await new_key(world)
    assert (await ring(world).authenticate(made.secret)).scopes == scopes_of(Role.DEVELOPER)
