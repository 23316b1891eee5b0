"""What the command line changes, when it takes more than one step."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from claude_wrapper.app import security_levels
from claude_wrapper.app.offline import Offline
from claude_wrapper.cli.finding import organization, user_id
from claude_wrapper.config import Settings
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits import CHANNEL, Action, Budget, Limits, Period, Scope
from claude_wrapper.limits.budgets import DOLLAR
from claude_wrapper.limits.records import BudgetDraft, change_budget, create_budget, list_budgets, set_limits
from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.security import SETTING as SECURITY_LEVEL
from claude_wrapper.storage.engine import announce
from claude_wrapper.storage.pagination import MAX_LIMIT, PageRequest
from claude_wrapper.tenancy.apikeys import create_api_key, update_api_key
from claude_wrapper.tenancy.keyrecords import KeyChange, KeySpec, NewApiKey
from claude_wrapper.tenancy.orgs import OrganizationChange, update_organization
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.tenancy.scopes import parse_role
from claude_wrapper.tenancy.subjects import require_subject
from claude_wrapper.vault.credentials import create_credential, list_credentials, update_credential
from claude_wrapper.vault.kinds import CredentialKind
from claude_wrapper.vault.records import Credential, CredentialChange, CredentialSpec

Kind = TypeVar("Kind", bound=enum.StrEnum)


async def _inside(offline: Offline, name: str) -> Principal:
    return offline.operator.acting_in((await organization(offline, name)).id)


async def set_security_level(offline: Offline, org: str, level: str | None, settings: Settings) -> str:
    """What was done, in words. Raises InvalidRequest for a level beyond the operator's bound."""
    if level is not None:
        security_levels(settings, Level.BWRAP).require(level)
    boss = await _inside(offline, org)
    async with offline.database.transaction() as tx:
        changed = await update_organization(
            tx, boss, offline.scribe, OrganizationChange(settings={SECURITY_LEVEL: level})
        )
    return f"{changed.name}: security level {level or 'of the server'}, for turns that begin in ten seconds"


async def create_key(
    offline: Offline,
    org: str,
    *,
    name: str,
    role: str,
    workspace: str | None,
    user: str | None,
    models: Sequence[str],
    limits: str,
    days: int | None,
) -> NewApiKey:
    """A new API key."""
    boss = await _inside(offline, org)
    spec = KeySpec(
        name=name,
        role=parse_role(role),
        workspace_id=workspace,
        user_id=await user_id(offline, boss, user),
        allowed_models=list(models) or None,
        limits=Limits.parse(limits).to_json(),
        expires_at=None if days is None else offline.scribe.now() + timedelta(days=days),
    )
    async with offline.database.transaction() as tx:
        made = await create_api_key(tx, boss, offline.scribe, offline.pepper, spec)
        announce(tx, CHANNEL, boss.org.encode())
        return made


async def set_credential(
    offline: Offline,
    org: str,
    secret: Mapping[str, str],
    *,
    kind: str,
    name: str,
    base_url: str | None,
    config: Sequence[str],
    workspace: str | None,
    user: str | None,
) -> Credential:
    """The credential of this name and reach with this secret: changed, or made."""
    boss = await _inside(offline, org)
    chosen = _choice(CredentialKind, kind, "kind")
    person = await user_id(offline, boss, user)
    settings = dict(_pair(text) for text in config)
    keys = await offline.org_keys.of(boss.org)
    async with offline.database.transaction() as tx:
        page = await list_credentials(tx, boss, PageRequest(limit=MAX_LIMIT), workspace_id=workspace, user_id=person)
        same = (chosen, name, workspace, person)
        for one in page.data:
            if (one.kind, one.name, one.workspace_id, one.user_id) == same:
                change = CredentialChange(secret=secret, config=settings or None, base_url=base_url)
                return await update_credential(tx, boss, offline.scribe, one.id, change, keys=keys, rules=offline.rules)
        spec = CredentialSpec(
            kind=chosen,
            name=name,
            secret=secret,
            config=settings,
            base_url=base_url,
            workspace=workspace,
            user=person,
        )
        return await create_credential(tx, boss, offline.scribe, spec, keys=keys, rules=offline.rules)


async def set_budget(
    offline: Offline, org: str, *, dollars: float, per: str, action: str, scope: str, subject: str | None
) -> Budget:
    """The subject's budget for this period: changed, or made."""
    boss = await _inside(offline, org)
    whose, period, then = _choice(Scope, scope, "scope"), _choice(Period, per, "per"), _choice(Action, action, "action")
    named = _subject(boss, whose, subject)
    cap = round(dollars * DOLLAR)
    scribe = offline.scribe
    async with offline.database.transaction() as tx:
        await require_subject(tx, boss, whose.value, named)
        present = await list_budgets(tx, boss, scope=whose, subject=named)
        old = next((one for one in present if one.period is period), None)
        if old is None:
            draft = BudgetDraft(whose, named, period, cap, then)
            made = await create_budget(tx, boss, draft, clock=scribe.clock, ids=scribe.ids)
        else:
            made = await change_budget(tx, boss, old.id, cap_micros=cap, action=then, clock=scribe.clock)
        after = {"scope": whose.value, "subject": named, "period": period.value, "cap_micros": cap}
        before = None if old is None else {"cap_micros": old.cap_micros, "action": old.action.value}
        verb = "create" if old is None else "update"
        await scribe.record(tx, boss, f"budget.{verb}", ("budget", made.id), before=before, after=after)
        return made


async def set_limits_of(offline: Offline, org: str, text: str, *, scope: str, subject: str | None) -> None:
    """Replace the limits of a subject."""
    boss = await _inside(offline, org)
    whose, limits = _choice(Scope, scope, "scope"), Limits.parse(text)
    named = _subject(boss, whose, subject)
    async with offline.database.transaction() as tx:
        await require_subject(tx, boss, whose.value, named)
        if whose is Scope.KEY:
            await update_api_key(tx, boss, offline.scribe, named, KeyChange(limits=limits.to_json()))
            announce(tx, CHANNEL, boss.org.encode())
            return
        await set_limits(tx, boss, whose, named, limits, clock=offline.scribe.clock)
        after = {"limits": limits.to_json()}
        await offline.scribe.record(tx, boss, "limits.update", (whose.value, named), after=after)


def _subject(boss: Principal, scope: Scope, subject: str | None) -> str:
    if scope is Scope.ORGANIZATION:
        return boss.org
    if subject is None:
        raise InvalidRequest(f"name the {scope} with --subject", field="subject")
    return subject


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise InvalidRequest("must look like region=eu-west-1", field="set")
    return name, value


def _choice(kinds: type[Kind], value: str, field: str) -> Kind:
    try:
        return kinds(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(kinds)}", field=field) from None
