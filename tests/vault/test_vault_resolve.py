"""Which credential a request uses: the order as a table, and no silent fall-back to somebody else's money."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from vault_doubles import PLANTED, Vault

from claude_wrapper.errors import CredentialMissing, InvalidRequest, NotFound
from claude_wrapper.vault.kinds import CredentialKind, UrlPolicy, clean_base_url, clean_config, clean_secret
from claude_wrapper.vault.probe import ProbeAnswer, Validity, probe
from claude_wrapper.vault.records import Credential, CredentialSpec, Status
from claude_wrapper.vault.resolve import OPERATOR_CREDENTIAL, choose
from tenants import owner

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ASKER = replace(owner("org_1"), workspace="red", user_id="ada")


def credential(name: str, **changed: Any) -> Credential:
    made = Credential(
        id=name, org_id="org_1", workspace_id=None, user_id=None, kind=CredentialKind.API_KEY, name=name,
        base_url="https://x", config={}, hint="", fingerprint="", rank=0, named_only=False, status=Status.ACTIVE,
        problem=None, expires_at=None, created_at=NOW, updated_at=NOW, version=1,
    )  # fmt: skip
    return replace(made, **changed)


ORG = credential("org")
WORKSPACE = credential("workspace", workspace_id="red")
USER = credential("user", user_id="ada")
USER_HERE = credential("user here", user_id="ada", workspace_id="red")
OTHERS = (
    credential("other org", org_id="org_2"),
    credential("other workspace", workspace_id="blue"),
    credential("other user", user_id="ben"),
    credential("other user here", user_id="ben", workspace_id="red"),
)


def chosen(*known: Credential, named: str | None = None, asker: Any = ASKER, operator: bool = False) -> list[str]:
    choice = choose(asker, (*OTHERS, *known), named=named, operator=operator, now=NOW)
    return [OPERATOR_CREDENTIAL] if choice.operator else [one.id for one in choice.candidates]


@pytest.mark.parametrize(
    ("known", "named", "expected"),
    [
        ((ORG,), None, ["org"]),
        ((ORG, WORKSPACE), None, ["workspace"]),
        ((ORG, WORKSPACE, USER), None, ["user"]),
        ((ORG, WORKSPACE, USER, USER_HERE), None, ["user here", "user"]),
        ((ORG, WORKSPACE, USER), "org", ["org"]),
        ((ORG, WORKSPACE, USER), "workspace", ["workspace"]),
        ((credential("low", rank=1), credential("high", rank=2), ORG), None, ["high", "low", "org"]),
        ((ORG, credential("newer", created_at=NOW + timedelta(1))), None, ["newer", "org"]),
        ((ORG, credential("off", rank=9, status=Status.DISABLED)), None, ["org"]),
        ((ORG, credential("quiet", user_id="ada", named_only=True)), None, ["org"]),
        ((ORG, credential("quiet", named_only=True)), "quiet", ["quiet"]),
    ],
)
def test_the_order_of_choice(known: tuple[Credential, ...], named: str | None, expected: list[str]) -> None:
    assert chosen(*known, named=named) == expected
    assert chosen(*reversed(known), named=named) == expected


@pytest.mark.parametrize("named", [one.id for one in OTHERS] + ["nothing"])
def test_what_belongs_to_somebody_else_is_not_found(named: str) -> None:
    with pytest.raises(NotFound):
        chosen(ORG, named=named)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"status": Status.DISABLED}, "disabled"),
        ({"status": Status.INVALID, "problem": "invalid_grant"}, "invalid_grant"),
        ({"expires_at": NOW}, "expired"),
    ],
)
def test_a_users_broken_credential_does_not_fall_back_on_the_organisations(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(CredentialMissing, match=why):
        chosen(ORG, WORKSPACE, replace(USER, **changed))
    with pytest.raises(CredentialMissing, match=why):
        chosen(ORG, replace(USER, **changed), named="user")


def test_an_access_token_past_its_end_may_be_chosen_as_it_can_be_refreshed() -> None:
    assert chosen(credential("oauth", kind=CredentialKind.OAUTH, expires_at=NOW - timedelta(1))) == ["oauth"]


def test_the_operators_credential_is_for_the_operators_own_people_alone() -> None:
    staff = replace(ASKER, is_staff=True)
    assert chosen(asker=staff, operator=True) == [OPERATOR_CREDENTIAL]
    assert chosen(ORG, asker=staff, operator=True) == ["org"]
    for asker, operator in ((ASKER, True), (staff, False)):
        with pytest.raises(CredentialMissing, match="no upstream credential"):
            chosen(asker=asker, operator=operator)


def test_a_key_without_a_user_gets_no_users_credential() -> None:
    assert chosen(ORG, USER, asker=replace(ASKER, user_id=None)) == ["org"]


def test_a_key_of_the_whole_organisation_gets_no_workspaces_credential() -> None:
    assert chosen(ORG, WORKSPACE, asker=replace(ASKER, workspace=None)) == ["org"]


# Over a database -------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_lease_follows_changes_at_once(vault: Vault) -> None:
    ours = vault.world.ours
    with pytest.raises(CredentialMissing):
        await vault.resolver.lease(ours)
    first = await vault.create(ours)
    assert (await vault.resolver.lease(ours)).id == first.id
    second = await vault.create(ours, rank=5, secret={"api_key": PLANTED + "2"})
    leased = await vault.resolver.lease(ours)
    assert (leased.id, leased.secret) == (second.id, PLANTED + "2")
    assert [one.id for one in await vault.resolver.lease_all(ours)] == [second.id, first.id]


@pytest.mark.anyio
async def test_a_replica_that_missed_the_announcement_sees_a_change_within_half_a_minute(vault: Vault) -> None:
    ours = vault.world.ours
    deaf = vault.new_resolver(vault.refresher)
    first = await vault.create(ours)
    assert (await deaf.lease(ours)).id == first.id
    second = await vault.create(ours, rank=5)
    assert (await deaf.lease(ours)).id == first.id
    vault.clock.advance(31)
    assert (await deaf.lease(ours)).id == second.id


@pytest.mark.anyio
async def test_staff_get_the_operators_credential_and_customers_do_not(vault: Vault) -> None:
    staff = replace(vault.world.ours, is_staff=True)
    leased = await vault.resolver.lease(staff)
    assert (leased.id, leased.org, leased.bearer) == (OPERATOR_CREDENTIAL, staff.org, False)
    assert "OPERATOR" not in repr(leased)
    with pytest.raises(CredentialMissing):
        await vault.resolver.lease(vault.world.theirs)


@pytest.mark.anyio
async def test_the_other_parts_of_a_secret_go_along_and_the_refresh_token_never(vault: Vault) -> None:
    ours = vault.world.ours
    secret = {"access_key_id": "AKIA", "secret_access_key": PLANTED, "session_token": "st"}
    aws = await vault.create(ours, CredentialSpec(CredentialKind.BEDROCK, "aws", secret, {"region": "eu-west-1"}))
    leased = await vault.resolver.lease(ours, named=aws.id)
    assert (leased.secret, dict(leased.further)) == (PLANTED, {"access_key_id": "AKIA", "session_token": "st"})
    assert leased.base_url == "https://bedrock-runtime.eu-west-1.amazonaws.com"
    oauth = await vault.oauth(ours)
    assert (await vault.resolver.lease(ours, named=oauth.id)).further == {}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "validity"),
    [
        (ProbeAnswer(200), Validity.VALID),
        (ProbeAnswer(401, "authentication_error"), Validity.INVALID),
        (ProbeAnswer(403, "permission_error"), Validity.INVALID),
        (ProbeAnswer(429, "rate_limit_error"), Validity.VALID),
        (ProbeAnswer(529, "overloaded_error"), Validity.UNKNOWN),
        (ConnectionError("refused by sk-ant-api03-PLANTED"), Validity.UNKNOWN),
    ],
)
async def test_a_probe_says_what_is_known_of_the_credential(
    vault: Vault, answer: ProbeAnswer | Exception, validity: Validity
) -> None:
    await vault.create(vault.world.ours)

    async def call(leased: Any) -> ProbeAnswer:
        assert leased.secret == PLANTED
        if isinstance(answer, Exception):
            raise answer
        return answer

    result = await probe(await vault.resolver.lease(vault.world.ours), call, vault.clock)
    assert result.validity is validity
    assert "PLANTED" not in repr(result)


# What a credential may consist of --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "secret", "field"),
    [
        ("api_key", {}, "secret"),
        ("api_key", {"api_key": ""}, "secret.api_key"),
        ("api_key", {"api_key": "a\r\nx-evil: 1"}, "secret.api_key"),
        ("api_key", {"api_key": 5}, "secret.api_key"),
        ("api_key", {"api_key": "k", "access_token": "t"}, "secret.access_token"),
        ("api_key", {"sk-ant-api03-PLANTED": "k"}, "secret.(a name that is not shown)"),
        ("oauth", {"refresh_token": "r"}, "secret"),
        ("bedrock", {"secret_access_key": "s"}, "secret.access_key_id"),
        ("bedrock", {"api_key": "s", "access_key_id": "s"}, "secret.access_key_id"),
        ("vertex", {"service_account_json": "{}", "access_token": "t"}, "secret"),
    ],
)
def test_a_wrong_secret_is_refused_by_field_and_not_shown(kind: str, secret: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        clean_secret(CredentialKind(kind), secret)
    assert caught.value.field == field
    assert "PLANTED" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "config", "field"),
    [
        ("bedrock", {}, "config.region"),
        ("bedrock", {"region": "eu-west-1.evil.com/"}, "config.region"),
        ("bedrock", {"region": "eu-west-1#"}, "config.region"),
        ("foundry", {"resource": "a@b"}, "config.resource"),
        ("vertex", {"project": "p", "region": "r", "x": "y"}, "config.x"),
        ("custom", {"auth": "basic"}, "config.auth"),
    ],
)
def test_wrong_settings_are_refused_by_field(kind: str, config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        clean_config(CredentialKind(kind), config)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "url",
    [
        None, "", "x", "http://example.com", "ftp://example.com", "https://user:pw@example.com", "https://example.com/?q=1",
        "https://example.com/#f", "https://localhost", "https://127.0.0.1", "https://[::1]/", "https://10.0.0.8",
        "https://169.254.169.254/latest", "https://2130706433/", "https://0x7f.1", "https://127.1", "https://metadata.internal",
        "https://printer.local", "https://intranet", "https://exa mple.com", "https://example.com\\@evil.com",
        "https://[::ffff:127.0.0.1]", "https://example.com:99999",
    ],
)  # fmt: skip
def test_a_base_url_that_could_reach_inwards_or_hides_something_is_refused(url: str | None) -> None:
    with pytest.raises(InvalidRequest, match="base_url"):
        clean_base_url(CredentialKind.CUSTOM, url, {}, UrlPolicy())


def test_base_urls_that_are_meant_pass() -> None:
    assert (
        clean_base_url(CredentialKind.CUSTOM, "https://gw.example.com/v1/", {}, UrlPolicy())
        == "https://gw.example.com/v1"
    )
    inside = UrlPolicy(allow_http=True, allow_private=True)
    assert clean_base_url(CredentialKind.CUSTOM, "http://127.0.0.1:9", {}, inside) == "http://127.0.0.1:9"
    assert clean_base_url(CredentialKind.API_KEY, None, {}, UrlPolicy()) == "https://api.anthropic.com"
    with pytest.raises(InvalidRequest, match="custom"):
        clean_base_url(CredentialKind.API_KEY, "https://gw.example.com", {}, UrlPolicy())
