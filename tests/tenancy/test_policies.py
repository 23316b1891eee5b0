"""Policies of an organisation: checked when written, read back as written, never anybody else's."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy import orgs
from claude_wrapper.tenancy.audit import list_audit_entries
from claude_wrapper.tenancy.orgs import OrganizationChange
from claude_wrapper.tenancy.policies import DEFAULT, CacheAnswers, Policies, parse
from claude_wrapper.tenancy.policybook import PolicyBook, get_policies, set_policies
from claude_wrapper.tenancy.scopes import Role
from tenants import World

_MODEL = st.from_regex(r"claude-[a-z0-9-]{1,12}", fullmatch=True)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"fallback_model": {}}, "fallback_model"),
        ({"fallback_models": ["a"]}, "fallback_models"),
        ({"fallback_models": {"a": "b"}}, "fallback_models.a"),
        ({"fallback_models": {"a": []}}, "fallback_models.a"),
        ({"fallback_models": {"a": ["a"]}}, "fallback_models.a"),
        ({"fallback_models": {"a": ["b", "b"]}}, "fallback_models.a"),
        ({"fallback_models": {"a*": ["b"]}}, "fallback_models.a*"),
        ({"fallback_models": {"a": ["b*"]}}, "fallback_models.a"),
        ({"fallback_models": {"a": ["b", "c", "d", "e", "f"]}}, "fallback_models.a"),
        ({"fallback_credentials": "yes"}, "fallback_credentials"),
        ({"cache_answers": "always"}, "cache_answers"),
        ({"cache_seconds": 0}, "cache_seconds"),
        ({"cache_seconds": True}, "cache_seconds"),
        ({"cli_version": "../bin/sh"}, "cli_version"),
        ({"cache_share_with": "org_1"}, "cache_share_with"),
        ({"cache_share_with": {"org_1": True}}, "cache_share_with"),
        ({"cache_share_with": ["Acme"]}, "cache_share_with"),
        ({"cache_share_with": [1]}, "cache_share_with"),
        ({"cache_share_with": ["org_1", "org_1"]}, "cache_share_with"),
        ({"cache_share_with": [f"org_{number}" for number in range(9)]}, "cache_share_with"),
    ],
)
def test_a_bad_policy_is_refused_by_its_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(values)
    assert caught.value.field == field


@given(
    st.builds(
        Policies,
        fallback_models=st.dictionaries(
            _MODEL, st.lists(_MODEL.map("x".__add__), min_size=1, max_size=4, unique=True).map(tuple), max_size=3
        ),
        fallback_credentials=st.booleans(),
        cache_answers=st.sampled_from(CacheAnswers),
        cache_seconds=st.integers(1, 86_400),
        cache_share_with=st.lists(st.from_regex(r"org_[a-z0-9]{1,26}", fullmatch=True), max_size=8, unique=True).map(
            tuple
        ),
        cli_version=st.none() | st.from_regex(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}", fullmatch=True),
    )
)
def test_what_is_written_is_read_back(policies: Policies) -> None:
    assert parse(policies.to_json()) == policies


@pytest.mark.anyio
async def test_a_change_is_in_force_at_once_and_for_nobody_else(world: World) -> None:
    book = PolicyBook(world.db, world.clock)
    assert await book.of(world.ours) == DEFAULT
    change = {"fallback_models": {"*": ["claude-haiku-4-5"]}, "cache_answers": "deterministic"}
    with pytest.raises(PermissionDenied):
        await world.do(set_policies, world.as_role(Role.DEVELOPER), change)
    made = await world.do(set_policies, world.ours, change)
    book.heard(None)
    assert await book.of(world.ours) == made
    assert made.models_after("claude-opus-5-5") == ("claude-haiku-4-5",)
    assert await book.of(world.theirs) == DEFAULT
    after = await world.do(set_policies, world.ours, {"fallback_models": None})
    assert after == Policies(cache_answers=CacheAnswers.DETERMINISTIC)


@pytest.mark.anyio
async def test_naming_a_partner_is_audited_needs_an_administrator_and_tells_nobody_who_else_is_here(
    world: World,
) -> None:
    for asker in (world.as_role(Role.DEVELOPER), world.as_role(Role.VIEWER), world.as_role(Role.BILLING)):
        with pytest.raises(PermissionDenied):
            await world.do(set_policies, asker, {"cache_share_with": [world.theirs.org]})
    with pytest.raises(InvalidRequest, match="itself"):
        await world.do(set_policies, world.ours, {"cache_share_with": [world.ours.org]})
    for one in (world.theirs.org, "org_nobody"):  # one that exists, and one that does not
        made = await world.do(set_policies, world.ours, {"cache_share_with": [one]})
        assert made.cache_share_with == (one,)
    assert await world.see(get_policies, world.theirs) == DEFAULT
    entries = (await world.see(list_audit_entries, world.ours, PageRequest())).data
    assert [entry.action for entry in entries[:2]] == ["organization.update"] * 2
    assert entries[0].before is not None
    assert entries[0].after is not None
    assert entries[0].before["settings"]["policies"]["cache_share_with"] == [world.theirs.org]
    assert entries[0].after["settings"]["policies"]["cache_share_with"] == ["org_nobody"]


@pytest.mark.anyio
async def test_values_that_cannot_be_read_are_left_out_and_no_door_lets_them_in(world: World) -> None:
    bad = OrganizationChange(settings={"policies": {"cache_seconds": -1}})
    with pytest.raises(InvalidRequest):
        await world.do(orgs.update_organization, world.ours, bad)
    async with world.db.transaction() as tx:
        mine = organizations.c.id == world.ours.org
        kept = {"policies": {"cache_seconds": -1, "fallback_credentials": True, "of_a_later_version": 1}}
        await tx.execute(sa.update(organizations).where(mine).values(settings=kept))
        assert await get_policies(tx, world.ours) == Policies(fallback_credentials=True)
