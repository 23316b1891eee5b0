"""The vault over a real database: nothing in the clear, nothing across tenants, and a wrong master key stops the start."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from vault_doubles import PLANTED, RULES, Vault, material

from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, VaultSealed
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.storage.tables.tenancy import audit_log
from claude_wrapper.storage.tables.vault import vault_credentials, vault_org_keys, vault_secrets
from claude_wrapper.telemetry import logs
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.vault import credentials
from claude_wrapper.vault.credentials import Rules
from claude_wrapper.vault.envelope import Unreadable
from claude_wrapper.vault.erasure import erase_vault
from claude_wrapper.vault.keys import LocalMasterKey
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.orgkeys import unseal
from claude_wrapper.vault.records import CredentialChange, CredentialSpec, Status
from claude_wrapper.vault.rotation import rotate_master
from claude_wrapper.vault.secretstore import SecretStore
from tenants import World

pytestmark = pytest.mark.anyio


async def update(vault: Vault, principal: Any, credential_id: str, **changed: Any) -> Any:
    keys = await vault.keys.of(principal.org)
    change = CredentialChange(**changed)
    return await vault.world.do(credentials.update_credential, principal, credential_id, change, keys=keys, rules=RULES)


# Secrets stay secret ---------------------------------------------------------------------------------------------------


async def test_a_stored_secret_is_nowhere_in_the_clear(vault: Vault) -> None:
    out = io.StringIO()
    handle = logs.configure("debug", "json", out)
    ours = vault.world.ours
    made = await vault.create(ours)
    await vault.oauth(ours)
    await SecretStore(vault.db, vault.keys, vault.clock, vault.world.scribe.ids).put(
        ours, "mcp_oauth", "x", {"token": PLANTED}
    )
    leased = await vault.resolver.lease(ours, named=made.id)
    structlog.get_logger().info("a.b", leased=leased, made=made, text=str(leased), shown=repr(made))
    handle.close()
    structlog.reset_defaults()
    assert leased.secret == PLANTED
    stored = await vault.everything_stored()
    assert made.id.encode() in stored  # the search does look at the rows
    assert b"PLANTED" not in stored
    for shown in (repr(leased), repr(made), str(leased), out.getvalue()):
        assert "PLANTED" not in shown
    assert made.hint == PLANTED[-4:]


async def test_specs_and_changes_hide_their_secrets() -> None:
    assert "PLANTED" not in repr(CredentialSpec(CredentialKind.API_KEY, "n", {"api_key": PLANTED}))
    assert "PLANTED" not in repr(CredentialChange(secret={"api_key": PLANTED}))


async def test_the_audit_log_tells_of_changes_without_secrets(vault: Vault) -> None:
    made = await vault.create(vault.world.ours)
    await update(vault, vault.world.ours, made.id, secret={"api_key": PLANTED + "2"})
    await vault.world.do(credentials.delete_credential, vault.world.ours, made.id)
    async with vault.db.read() as tx:
        rows = list(await tx.execute(sa.select(audit_log).where(audit_log.c.target_id == made.id)))
    assert [row.action for row in rows] == ["credential.create", "credential.update", "credential.delete"]
    assert rows[1].before["fingerprint"] != rows[1].after["fingerprint"]
    assert "PLANTED" not in str(rows)


async def test_a_ciphertext_that_is_moved_to_another_tenant_or_row_does_not_open(vault: Vault) -> None:
    ours, theirs = await vault.create(vault.world.ours), await vault.create(vault.world.theirs)
    second = await vault.create(vault.world.ours, name="second")
    table = vault_credentials
    for victim, thief, principal in ((ours, theirs, vault.world.theirs), (ours, second, vault.world.ours)):
        async with vault.db.transaction() as tx:
            stolen = await tx.scalar(sa.select(table.c.sealed).where(table.c.id == victim.id))
            await tx.execute(table.update().where(table.c.id == thief.id).values(sealed=stolen))
        vault.resolver.forget(principal.org)
        with pytest.raises(Unreadable):
            await vault.resolver.lease(principal, named=thief.id)


async def test_a_data_key_that_is_moved_to_another_tenant_does_not_open(vault: Vault) -> None:
    await vault.create(vault.world.ours)
    await vault.create(vault.world.theirs)
    table = vault_org_keys
    async with vault.db.transaction() as tx:
        stolen = await tx.scalar(sa.select(table.c.wrapped).where(table.c.org_id == vault.world.ours.org))
        await tx.execute(table.update().where(table.c.org_id == vault.world.theirs.org).values(wrapped=stolen))
    with pytest.raises(VaultSealed):
        await vault.new_keys().of(vault.world.theirs.org)


# The master key --------------------------------------------------------------------------------------------------------


async def test_a_wrong_master_key_stops_the_start_and_the_right_one_does_not(vault: Vault) -> None:
    await unseal(vault.db, vault.master, vault.clock)
    await unseal(vault.db, vault.master, vault.clock)
    with pytest.raises(VaultSealed, match=vault.master.primary):
        await unseal(vault.db, LocalMasterKey([material(8)]), vault.clock)
    await vault.create(vault.world.ours)
    with pytest.raises(VaultSealed, match=vault.master.primary):
        await unseal(vault.db, LocalMasterKey([material(8)]), vault.clock)
    await unseal(vault.db, vault.master, vault.clock)


async def test_rotation_rewraps_every_key_touches_no_record_and_lets_the_old_key_go(vault: Vault) -> None:
    world = vault.world
    made = [await vault.create(world.ours), await vault.create(world.theirs)]
    await unseal(vault.db, vault.master, vault.clock)
    async with vault.db.read() as tx:
        before = {row.id: row.sealed for row in await tx.execute(sa.select(vault_credentials))}
    both = LocalMasterKey([material(8), material(7)])
    await unseal(vault.db, both, vault.clock)
    with pytest.raises(PermissionDenied):
        await rotate_master(vault.db, world.ours, both, vault.clock)
    told: list[int] = []
    done = await rotate_master(vault.db, world.operator, both, vault.clock, progress=told.append)
    assert (done.rewrapped, done.retired, told) == (2, (vault.master.primary,), [2])
    assert (await rotate_master(vault.db, world.operator, both, vault.clock)).rewrapped == 0
    new = LocalMasterKey([material(8)])
    await unseal(vault.db, new, vault.clock)
    keys = vault.new_keys(new)
    async with vault.db.read() as tx:
        after = {row.id: row.sealed for row in await tx.execute(sa.select(vault_credentials))}
    assert before == after
    for one in made:
        opened = (await keys.of(one.org_id)).open_values(after[one.id], table="vault_credentials", record=one.id)
        assert opened == {"api_key": PLANTED}
    with pytest.raises(VaultSealed):
        await unseal(vault.db, vault.master, vault.clock)


async def test_rotation_without_the_old_key_says_which_one_it_needs(vault: Vault) -> None:
    await vault.create(vault.world.ours)
    with pytest.raises(VaultSealed, match=vault.master.primary):
        await rotate_master(vault.db, vault.world.operator, LocalMasterKey([material(8)]), vault.clock)


async def test_two_replicas_that_make_a_first_key_agree_on_one(vault: Vault) -> None:
    import asyncio

    one, other = vault.new_keys(), vault.new_keys()
    first, second = await asyncio.gather(one.of(vault.world.ours.org), other.of(vault.world.ours.org))
    sealed = first.seal(b"x", table="t", record="r")
    assert second.open(sealed, table="t", record="r") == b"x"


async def test_a_new_data_key_is_seen_by_a_replica_that_has_the_old_ones(vault: Vault) -> None:
    org = vault.world.ours.org
    one, other = vault.new_keys(), vault.new_keys()
    old = (await other.of(org)).seal(b"old", table="t", record="r")
    renewed = await one.renew(org)
    sealed = renewed.seal(b"new", table="t", record="r")
    seen = await other.of(org, opening=sealed)
    assert seen.open(sealed, table="t", record="r") == b"new"
    assert renewed.open(old, table="t", record="r") == b"old"


# Who may do what -------------------------------------------------------------------------------------------------------


async def test_another_organisations_credential_is_not_found_by_any_call(vault: Vault) -> None:
    world = vault.world
    made = await vault.create(world.ours)
    with pytest.raises(NotFound):
        await world.see(credentials.get_credential, world.theirs, made.id)
    with pytest.raises(NotFound):
        await update(vault, world.theirs, made.id, name="x")
    with pytest.raises(NotFound):
        await world.do(credentials.delete_credential, world.theirs, made.id)
    with pytest.raises(NotFound):
        await vault.resolver.lease(world.theirs, named=made.id)
    assert (await world.see(credentials.list_credentials, world.theirs, PageRequest())).data == ()


@pytest.mark.parametrize("role", [Role.DEVELOPER, Role.BILLING, Role.VIEWER])
async def test_only_owners_and_admins_manage_the_organisations_credentials(vault: Vault, role: Role) -> None:
    made = await vault.create(vault.world.ours)
    someone = vault.world.as_role(role, user_id=None, key_id="apikey_1")
    for call in (
        vault.create(someone),
        vault.world.see(credentials.get_credential, someone, made.id),
        vault.world.see(credentials.list_credentials, someone, PageRequest()),
        vault.world.do(credentials.delete_credential, someone, made.id),
    ):
        with pytest.raises(PermissionDenied):
            await call


async def test_a_developer_keeps_a_credential_of_their_own_and_sees_no_other(vault: Vault) -> None:
    world = vault.world
    ada, ben = await vault.add_user(world.ours, "ada"), await vault.add_user(world.ours, "ben")
    shared = await vault.create(world.ours)
    as_ada, as_ben = world.as_role(Role.DEVELOPER, user_id=ada), world.as_role(Role.DEVELOPER, user_id=ben)
    own = await vault.create(as_ada, user=ada, name="ada's")
    assert [one.id for one in (await world.see(credentials.list_credentials, as_ada, PageRequest())).data] == [own.id]
    for hidden, who in ((shared, as_ada), (own, as_ben)):
        with pytest.raises(NotFound):
            await world.see(credentials.get_credential, who, hidden.id)
    with pytest.raises(PermissionDenied):
        await vault.create(as_ada, user=ben)
    await world.do(credentials.delete_credential, as_ada, own.id)


async def test_a_workspaces_key_stays_in_its_workspace(vault: Vault) -> None:
    world = vault.world
    red, blue = await vault.add_workspace(world.ours, "red"), await vault.add_workspace(world.ours, "blue")
    admin = world.as_role(Role.ADMIN, workspace=red)
    with pytest.raises(PermissionDenied):
        await vault.create(admin)
    with pytest.raises(PermissionDenied):
        await vault.create(admin, workspace=blue)
    inside = await vault.create(admin, workspace=red)
    outside = await vault.create(world.ours, workspace=blue)
    assert [one.id for one in (await world.see(credentials.list_credentials, admin, PageRequest())).data] == [inside.id]
    with pytest.raises(NotFound):
        await world.see(credentials.get_credential, admin, outside.id)


async def test_a_credential_for_a_strangers_workspace_or_user_is_refused(vault: Vault) -> None:
    world = vault.world
    theirs = await vault.add_workspace(world.theirs, "theirs")
    stranger = await vault.add_user(world.theirs, "stranger")
    with pytest.raises(NotFound):
        await vault.create(world.ours, workspace=theirs)
    with pytest.raises(NotFound):
        await vault.create(world.ours, user=stranger)


# Changes ---------------------------------------------------------------------------------------------------------------


async def test_two_editors_at_once_one_of_them_meets_a_conflict(vault: Vault) -> None:
    made = await vault.create(vault.world.ours)
    changed = await update(vault, vault.world.ours, made.id, name="renamed", expected_version=1)
    assert (changed.version, changed.name) == (2, "renamed")
    with pytest.raises(Conflict):
        await update(vault, vault.world.ours, made.id, name="again", expected_version=1)


async def test_a_base_url_cannot_be_pointed_elsewhere_without_the_secret(vault: Vault) -> None:
    spec = CredentialSpec(CredentialKind.CUSTOM, "gw", {"api_key": PLANTED}, base_url="https://gateway.example.com")
    made = await vault.create(vault.world.ours, spec)
    with pytest.raises(InvalidRequest, match="base_url"):
        await update(vault, vault.world.ours, made.id, base_url="https://evil.example.com")
    moved = await update(
        vault, vault.world.ours, made.id, base_url="https://new.example.com", secret={"api_key": "k" * 20}
    )
    assert moved.base_url == "https://new.example.com"
    region = await vault.create(
        vault.world.ours,
        CredentialSpec(CredentialKind.BEDROCK, "b", {"api_key": PLANTED}, {"region": "eu-west-1"}),
    )
    with pytest.raises(InvalidRequest, match="config"):
        await update(vault, vault.world.ours, region.id, config={"region": "us-east-1"})


async def test_a_new_secret_heals_and_enabling_alone_does_not(vault: Vault) -> None:
    made = await vault.create(vault.world.ours)
    async with vault.db.transaction() as tx:
        await tx.execute(vault_credentials.update().values(status="invalid", problem="401"))
    assert (await update(vault, vault.world.ours, made.id, disabled=False)).status is Status.INVALID
    healed = await update(vault, vault.world.ours, made.id, secret={"api_key": PLANTED + "2"})
    assert (healed.status, healed.problem) == (Status.ACTIVE, None)
    assert (await vault.resolver.lease(vault.world.ours)).secret == PLANTED + "2"


async def test_oauth_needs_the_operators_permission(vault: Vault) -> None:
    spec = CredentialSpec(CredentialKind.OAUTH, "n", {"access_token": PLANTED})
    with pytest.raises(InvalidRequest, match="operator"):
        await vault.create(vault.world.ours, spec, rules=Rules())


async def test_keys_of_another_organisation_cannot_seal_for_this_one(vault: Vault) -> None:
    keys = await vault.keys.of(vault.world.theirs.org)
    spec = CredentialSpec(CredentialKind.API_KEY, "n", {"api_key": PLANTED})
    with pytest.raises(ValueError, match="another organisation"):
        await vault.world.do(credentials.create_credential, vault.world.ours, spec, keys=keys, rules=RULES)


async def test_erasing_an_organisation_says_what_went_and_leaves_the_other_alone(vault: Vault) -> None:
    world = vault.world
    await vault.create(world.ours)
    await vault.oauth(world.ours)
    kept = await vault.create(world.theirs)
    store = SecretStore(vault.db, vault.keys, vault.clock, world.scribe.ids)
    await store.put(world.ours, "static_bearer", "x", {"token": PLANTED})
    with pytest.raises(PermissionDenied):
        await world.see(erase_vault, world.as_role(Role.ADMIN))
    async with vault.db.transaction() as tx:
        counts = await erase_vault(tx, world.ours)
    assert counts == {"credentials": 2, "secrets": 1, "data_keys": 1}
    assert (await vault.resolver.lease(world.theirs)).id == kept.id


# Other secrets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(vault: Vault) -> SecretStore:
    return SecretStore(vault.db, vault.keys, vault.clock, vault.world.scribe.ids)


async def test_a_secret_is_put_read_replaced_and_deleted(vault: Vault, store: SecretStore) -> None:
    ours = vault.world.ours
    secret = {"type": "mcp_oauth", "access_token": PLANTED, "refresh": {"client_id": "c", "scopes": ["a"]}}
    assert await store.put(ours, "mcp_oauth", "vlt_1/cred_1", secret) == 1
    assert await store.get(ours, "mcp_oauth", "vlt_1/cred_1") == secret
    assert await store.put(ours, "mcp_oauth", "vlt_1/cred_1", {"x": 1}) == 2
    assert await store.get_versioned(ours, "mcp_oauth", "vlt_1/cred_1") == ({"x": 1}, 2)
    assert await store.delete(ours, "mcp_oauth", "vlt_1/cred_1") is True
    assert await store.delete(ours, "mcp_oauth", "vlt_1/cred_1") is False
    with pytest.raises(NotFound):
        await store.get(ours, "mcp_oauth", "vlt_1/cred_1")


async def test_secrets_are_apart_between_tenants_and_kinds(vault: Vault, store: SecretStore) -> None:
    ours, theirs = vault.world.ours, vault.world.theirs
    await store.put(ours, "static_bearer", "same", {"token": "ours"})
    await store.put(theirs, "static_bearer", "same", {"token": "theirs"})
    assert await store.get(ours, "static_bearer", "same") == {"token": "ours"}
    assert await store.get(theirs, "static_bearer", "same") == {"token": "theirs"}
    with pytest.raises(NotFound):
        await store.get(ours, "environment_variable", "same")


async def test_a_secret_of_a_workspace_is_not_seen_from_another(vault: Vault, store: SecretStore) -> None:
    red = await vault.add_workspace(vault.world.ours, "red")
    blue = await vault.add_workspace(vault.world.ours, "blue")
    in_red, in_blue = (replace(vault.world.ours, workspace=one) for one in (red, blue))
    await store.put(in_red, "static_bearer", "x", {"token": PLANTED})
    with pytest.raises(NotFound):
        await store.get(in_blue, "static_bearer", "x")
    with pytest.raises(Conflict):
        await store.put(in_blue, "static_bearer", "x", {"token": "mine"})
    assert await store.delete(in_blue, "static_bearer", "x") is False
    assert await store.get(vault.world.ours, "static_bearer", "x") == {"token": PLANTED}


async def test_two_writers_of_one_secret_do_not_overwrite_each_other(vault: Vault, store: SecretStore) -> None:
    ours = vault.world.ours
    await store.put(ours, "mcp_oauth", "x", {"n": 1}, expected_version=0)
    with pytest.raises(Conflict):
        await store.put(ours, "mcp_oauth", "x", {"n": 2}, expected_version=0)
    assert await store.put(ours, "mcp_oauth", "x", {"n": 2}, expected_version=1) == 2
    with pytest.raises(Conflict):
        await store.put(ours, "mcp_oauth", "x", {"n": 3}, expected_version=1)


async def test_a_sealed_secret_that_is_renamed_in_the_database_does_not_open(vault: Vault, store: SecretStore) -> None:
    ours = vault.world.ours
    await store.put(ours, "static_bearer", "harmless", {"token": PLANTED})
    async with vault.db.transaction() as tx:
        await tx.execute(vault_secrets.update().values(name="important"))
    with pytest.raises(Unreadable):
        await store.get(ours, "static_bearer", "important")


@pytest.mark.parametrize(
    ("kind", "name", "secret", "field"),
    [
        ("Bad Kind", "x", {}, "kind"),
        ("ok", "", {}, "name"),
        ("ok", "a\nb", {}, "name"),
        ("ok", "x" * 301, {}, "name"),
        ("ok", "x", {"a": "b" * 70_000}, "secret"),
    ],
)
async def test_a_secret_that_cannot_be_kept_is_refused_by_field(
    world: World, store: SecretStore, kind: str, name: str, *, secret: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.put(world.ours, kind, name, secret)
    assert caught.value.field == field


async def test_secrets_need_their_scopes(vault: Vault, store: SecretStore) -> None:
    viewer, billing = vault.world.as_role(Role.VIEWER), vault.world.as_role(Role.BILLING)
    for call in (
        store.put(viewer, "static_bearer", "x", {}),
        store.delete(viewer, "static_bearer", "x"),
        store.get(billing, "static_bearer", "x"),
    ):
        with pytest.raises(PermissionDenied):
            await call


async def test_expiry_is_kept_with_its_zone(vault: Vault) -> None:
    made = await vault.oauth(vault.world.ours, seconds=90)
    assert made.expires_at == vault.clock.now() + timedelta(seconds=90)
