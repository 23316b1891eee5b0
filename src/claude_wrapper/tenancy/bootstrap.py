"""The first organisation and the operator's key: how a new server gets somebody who may do everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.storage.dialects import one_at_a_time
from claude_wrapper.storage.tables.tenancy import api_keys, organizations
from claude_wrapper.tenancy.apikeys import create_operator_key
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.orgs import Organization, create_organization, get_organization
from claude_wrapper.tenancy.principal import operator

OPERATOR_ORG_NAME = "Operator"


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """The operator's organisation; the secret only if a key was made by this call."""

    organization: Organization
    key_id: str
    secret: str | None = field(default=None, repr=False)


# tenant-scope: nothing exists yet that could be asked for
async def ensure_operator(
    tx: AsyncConnection, scribe: Scribe, pepper: Pepper, *, name: str = OPERATOR_ORG_NAME, new_key: bool = False
) -> Bootstrapped:
    """Make sure that the operator has a staff organisation and a live key; with `new_key`, make another one.

    Safe to call at every start, by several replicas at once: a second call changes nothing. An operator whose keys have
    all ended gets a new one in the same organisation.
    """
    await one_at_a_time(tx, "operator")
    boss = operator()
    now = scribe.now()
    live = sa.and_(api_keys.c.status == "active", sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now))
    known = (
        sa.select(api_keys.c.id, api_keys.c.org_id, live.label("live"))
        .join(organizations, organizations.c.id == api_keys.c.org_id)
        .where(api_keys.c.is_operator, organizations.c.deleted_at.is_(None))
        .order_by(sa.desc("live"), api_keys.c.created_at, api_keys.c.id)
        .limit(1)
    )
    row = (await tx.execute(known)).first()
    if row is not None:
        inside = boss.acting_in(row.org_id)
        if row.live and not new_key:
            return Bootstrapped(await get_organization(tx, inside), row.id)
    else:
        inside = boss.acting_in((await create_organization(tx, boss, scribe, name, is_staff=True)).id)
    made = await create_operator_key(tx, inside, scribe, pepper, name="operator")
    return Bootstrapped(await get_organization(tx, inside), made.key.id, made.secret)
