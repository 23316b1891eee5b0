"""Policies of an organisation: checked when written, read back as written, never anybody else's."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy import orgs
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
async def test_values_that_cannot_be_read_are_left_out_and_no_door_lets_them_in(world: World) -> None:
    bad = OrganizationChange(settings={"policies": {"cache_seconds": -1}})
    with pytest.raises(InvalidRequest):
        await world.do(orgs.update_organization, world.ours, bad)
    async with world.db.transaction() as tx:
        mine = organizations.c.id == world.ours.org
        kept = {"policies": {"cache_seconds": -1, "fallback_credentials": True, "of_a_later_version": 1}}
        await tx.execute(sa.update(organizations).where(mine).values(settings=kept))
        assert await get_policies(tx, world.ours) == Policies(fallback_credentials=True)
