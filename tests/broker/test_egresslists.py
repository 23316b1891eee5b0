"""Which hosts an organisation may reach follows from the level, the operator's list and its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import pytest

from claude_wrapper.broker.egresslists import EgressLists
from claude_wrapper.errors import ConfigurationError
from claude_wrapper.sandbox.security import Egress

pytestmark = pytest.mark.anyio


def level(egress: Egress) -> Callable[[str], Awaitable[Egress]]:
    async def of(org: str) -> Egress:
        return Egress.NONE if org == "org_strict" else egress

    return of


async def of_org(org: str) -> Iterable[str]:
    return {"org_a": ["docs.example.com", "not a host!"]}.get(org, [])


async def test_an_allow_list_holds_registries_the_operator_s_hosts_and_the_organisation_s_own() -> None:
    lists = EgressLists(level(Egress.ALLOWLIST), ["mirror.example.com:8443"], of_org)
    mine, other = await lists.rules("org_a"), await lists.rules("org_b")

    assert mine.allows("pypi.org", 443)
    assert mine.allows("mirror.example.com", 8443)
    assert mine.allows("docs.example.com", 443)
    assert not other.allows("docs.example.com", 443)
    assert not mine.allows("example.com", 443)


async def test_the_open_level_allows_the_web_and_git_and_no_mail() -> None:
    rules = await EgressLists(level(Egress.OPEN), (), of_org).rules("org_b")

    assert rules.allows("anything.example", 443)
    assert rules.allows("anything.example", 22)
    assert not rules.allows("mail.example", 25)


async def test_without_egress_an_organisation_s_list_is_void() -> None:
    lists = EgressLists(level(Egress.NONE), ["mirror.example.com"], of_org)

    assert not (await lists.rules("org_a")).allows("docs.example.com", 443)
    mixed = EgressLists(level(Egress.OPEN), [], of_org)
    assert not (await mixed.rules("org_strict")).allows("pypi.org", 443)
    assert (await mixed.rules("org_a")).allows("pypi.org", 443)


def test_an_operator_s_wrong_pattern_stops_the_start() -> None:
    with pytest.raises(ConfigurationError, match="host pattern"):
        EgressLists(level(Egress.ALLOWLIST), ["https://example.com/"])
