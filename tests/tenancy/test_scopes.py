"""Roles, scopes and principals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.tenancy import scopes
from claude_wrapper.tenancy.principal import Principal, operator, require_grantable, user_principal
from claude_wrapper.tenancy.scopes import ALL_SCOPES, SCOPES, Role, parse_role, parse_scopes, scopes_of

DOCS = Path(__file__).parents[2] / "docs" / "scopes.md"


def test_the_page_is_rendered_from_the_table() -> None:
    assert DOCS.read_text() == scopes.render_markdown()


def test_every_role_has_a_meaning_and_every_scope_says_what_it_allows() -> None:
    assert set(scopes.ROLE_MEANINGS) == set(Role)
    assert len({scope.name for scope in SCOPES}) == len(SCOPES)
    assert all(scope.allows and scope.name.count(":") == 1 for scope in SCOPES)


def test_an_owner_holds_everything_but_the_server_and_each_other_role_less() -> None:
    assert scopes_of(Role.OWNER) == ALL_SCOPES - {"operate:server"}
    for role in set(Role) - {Role.OWNER}:
        assert scopes_of(role) < scopes_of(Role.OWNER)
    assert scopes_of(Role.ADMIN) == scopes_of(Role.OWNER) - {"delete:organization"}


def test_who_only_looks_changes_and_runs_nothing() -> None:
    assert all(name.startswith("read:") for name in scopes_of(Role.VIEWER))
    assert {name for name in scopes_of(Role.BILLING) if not name.startswith("read:")} == {"write:budgets"}


def test_roles_are_known_by_our_name_and_by_anthropics() -> None:
    assert parse_role("owner") is parse_role("primary_owner") is Role.OWNER
    assert parse_role("workspace_developer") is Role.DEVELOPER
    with pytest.raises(InvalidRequest, match=r"^workspace_role: unknown role 'king'"):
        parse_role("king", field="workspace_role")


def test_an_unknown_scope_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="fly:moon"):
        parse_scopes(["read:usage", "fly:moon"])


def test_a_principal_cannot_be_changed_and_can_be_a_key_of_a_mapping() -> None:
    principal = user_principal("org_a", "user_a", Role.VIEWER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        principal.org = "org_b"  # type: ignore[misc]
    assert {principal: 1}[user_principal("org_a", "user_a", Role.VIEWER)] == 1


def test_a_missing_scope_is_refused_by_name() -> None:
    with pytest.raises(PermissionDenied, match="write:api_keys") as caught:
        user_principal("org_a", "user_a", Role.VIEWER).require("write:api_keys")
    assert caught.value.details["scope"] == "write:api_keys"


def test_only_the_operator_can_act_in_another_organisation() -> None:
    assert operator().acting_in("org_b").org == "org_b"
    with pytest.raises(PermissionDenied, match="operator"):
        user_principal("org_a", "user_a", Role.OWNER).acting_in("org_b")


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("given", list(Role))
def test_a_role_can_hand_on_exactly_what_it_holds(role: Role, given: Role) -> None:
    principal = user_principal("org_a", "user_a", role)
    if scopes_of(given) <= scopes_of(role):
        require_grantable(principal, scopes_of(given), what="it")
    else:
        with pytest.raises(PermissionDenied):
            require_grantable(principal, scopes_of(given), what="it")


def test_models_are_allowed_by_name_and_by_prefix() -> None:
    def allowing(*models: str) -> Principal:
        return dataclasses.replace(user_principal("o", "u", Role.DEVELOPER), allowed_models=frozenset(models))

    assert allowing("claude-haiku-*").may_use("claude-haiku-5")
    assert not allowing("claude-haiku-*").may_use("claude-opus-5")
    assert not allowing().may_use("claude-opus-5")
    assert allowing("*").may_use("anything")
