"""Environments: what a session's sandbox may reach and has installed, or that its tools run at the customer's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources.values import (
    Fields,
    host_of,
    merged_metadata,
    metadata_of,
    missing,
    name_of,
    wire_time,
)
from claude_wrapper.storage.dialects import for_update
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import environments as table
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:agents"
WRITE: Final = "write:agents"
ENVIRONMENT: Final = "env"
MANAGERS: Final = ("apt", "cargo", "gem", "go", "npm", "pip")
MAX_HOSTS: Final = 256
MAX_PACKAGES: Final = 100
# What a package manager takes as one argument: never an option, never anything for a shell.
_PACKAGE: Final = re.compile(r"[A-Za-z0-9@][A-Za-z0-9@._+/=<>~!:\[\],*^-]{0,199}\Z")


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment."""

    id: str
    name: str
    description: str | None
    config: Mapping[str, Any]
    """`{type: cloud, networking, packages}`, complete, or `{type: self_hosted}`."""
    metadata: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    workspace_id: str | None

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "environment",
            "name": self.name,
            "description": self.description,
            "config": dict(self.config),
            "metadata": dict(self.metadata),
            "scope": "organization",
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
            "archived_at": wire_time(self.archived_at),
        }


def resolve_config(given: Fields | None, present: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole configuration; what is omitted stays as it is, or gets its default. Pure."""
    if given is None:
        return dict(present) if present is not None else resolve_config(Fields({"type": "cloud"}, "config"))
    kind = given.one_of("type", "cloud", "self_hosted")
    if present is not None and kind != present["type"]:
        raise InvalidRequest(
            f"the type is {present['type']!r} and cannot be changed; make another environment",
            field=given.at("type"),
            details={"error_code": "invalid_config_type_change"},
        )
    if kind == "self_hosted":
        given.only("type")
        return {"type": "self_hosted"}
    given.only("type", "networking", "packages")
    before = present or {"networking": {"type": "unrestricted"}, "packages": {name: [] for name in MANAGERS}}
    networking = _networking(given.maybe_object("networking"), before["networking"])
    packages = _packages(given.maybe_object("packages"), before["packages"])
    if (
        networking["type"] == "limited"
        and not networking["allow_package_managers"]
        and any(packages[name] for name in MANAGERS)
    ):
        raise InvalidRequest(
            "must be true when packages are installed", field=given.at("networking.allow_package_managers")
        )
    return {"type": "cloud", "networking": networking, "packages": packages}


def _networking(given: Fields | None, before: Mapping[str, Any]) -> dict[str, Any]:
    if given is None:
        return dict(before)
    if given.one_of("type", "unrestricted", "limited") == "unrestricted":
        given.only("type")
        return {"type": "unrestricted"}
    given.only("type", "allowed_hosts", "allow_mcp_servers", "allow_package_managers")
    hosts = before.get("allowed_hosts", [])
    if given.given("allowed_hosts"):
        hosts = [host_of(host, path) for host, path in given.items("allowed_hosts", most=MAX_HOSTS)]
    return {
        "type": "limited",
        "allowed_hosts": list(dict.fromkeys(hosts)),
        **{
            name: given.boolean(name, default=bool(before.get(name, False)))
            for name in ("allow_mcp_servers", "allow_package_managers")
        },
    }


def _packages(given: Fields | None, before: Mapping[str, Any]) -> dict[str, Any]:
    packages: dict[str, Any] = {"type": "packages", **{name: before.get(name, []) for name in MANAGERS}}
    if given is None:
        return packages
    given.only("type", *MANAGERS)
    for name in MANAGERS:
        if not given.given(name):
            continue
        packages[name] = given.texts(name, most=MAX_PACKAGES, longest=200)
        for index, package in enumerate(packages[name]):
            if not _PACKAGE.match(package):
                raise InvalidRequest("is not the name of a package", field=f"{given.at(name)}[{index}]")
    return packages


async def create_environment(tx: AsyncConnection, principal: Principal, scribe: Scribe, fields: Fields) -> Environment:
    """A new environment. Needs `write:agents`; raises InvalidRequest naming the field."""
    principal.require(WRITE)
    fields.only("name", "description", "config", "metadata", "scope")
    _require_scope(fields)
    environment_id, now = scribe.ids.new(ENVIRONMENT), scribe.now()
    values = {
        "name": name_of(fields.text("name", most=255), fields.at("name")),
        "description": fields.maybe_text("description", most=2048),
        "config": resolve_config(fields.maybe_object("config")),
        "metadata": metadata_of(fields),
    }
    place = {"id": environment_id, "org_id": principal.org, "workspace_id": principal.workspace}
    await tx.execute(sa.insert(table).values(**place, **values, created_at=now, updated_at=now))
    await scribe.record(
        tx, principal, "environment.create", ("environment", environment_id), after={"name": values["name"]}
    )
    return await get_environment(tx, principal, environment_id)


async def get_environment(tx: AsyncConnection, principal: Principal, environment_id: str) -> Environment:
    """One environment. Needs `read:agents`; raises NotFound (`environment_not_found`)."""
    principal.require(READ)
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.id == environment_id))).first()
    if row is None:
        raise missing("environment", environment_id, error_code="environment_not_found")
    return _environment(row)


async def environment_for_session(tx: AsyncConnection, principal: Principal, environment_id: str) -> Environment:
    """An environment that a session may be started in. Raises NotFound, and InvalidRequest for an archived one."""
    environment = await get_environment(tx, principal, environment_id)
    if environment.archived_at is not None:
        raise _archived(environment_id)
    return environment


async def list_environments(
    tx: AsyncConnection, principal: Principal, request: PageRequest, *, include_archived: bool = False
) -> Page[Environment]:
    """Environments, newest first. Needs `read:agents`."""
    principal.require(READ)
    statement = sa.select(table).where(owned(principal, table))
    if not include_archived:
        statement = statement.where(table.c.archived_at.is_(None))
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _environment)


async def update_environment(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, environment_id: str, fields: Fields
) -> Environment:
    """Change what was sent. Needs `write:agents`; raises InvalidRequest for an archived one and for another type."""
    principal.require(WRITE)
    fields.only("name", "description", "config", "metadata", "scope")
    _require_scope(fields)
    present = await _locked(tx, principal, environment_id)
    if present.archived_at is not None:
        raise _archived(environment_id)
    values: dict[str, Any] = {}
    if fields.given("name"):
        values["name"] = name_of(fields.data["name"], fields.at("name"))
    if fields.has("description"):
        values["description"] = fields.maybe_text("description", most=2048)
    if (config := fields.maybe_object("config")) is not None:
        values["config"] = resolve_config(config, present.config)
    if (patch := fields.maybe_object("metadata")) is not None:
        values["metadata"] = merged_metadata(present.metadata, patch, empty_deletes=True)
    values = {name: value for name, value in values.items() if value != getattr(present, name)}
    if values:
        await _set(tx, principal, environment_id, **values, updated_at=scribe.now())
        await scribe.record(
            tx, principal, "environment.update", ("environment", environment_id), after={"fields": sorted(values)}
        )
    return await get_environment(tx, principal, environment_id)


async def archive_environment(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, environment_id: str
) -> Environment:
    """Archive an environment: no session can be started in it. Doing it twice is no error. Needs `write:agents`."""
    principal.require(WRITE)
    present = await _locked(tx, principal, environment_id)
    if present.archived_at is None:
        now = scribe.now()
        await _set(tx, principal, environment_id, archived_at=now, updated_at=now)
        await scribe.record(
            tx, principal, "environment.archive", ("environment", environment_id), after={"archived_at": now}
        )
    return await get_environment(tx, principal, environment_id)


async def delete_environment(tx: AsyncConnection, principal: Principal, scribe: Scribe, environment_id: str) -> None:
    """Delete an environment; sessions that were started in it keep their own copy. Needs `write:agents`."""
    principal.require(WRITE)
    done = await tx.execute(table.delete().where(owned(principal, table), table.c.id == environment_id))
    if not done.rowcount:
        raise missing("environment", environment_id, error_code="environment_not_found")
    await scribe.record(tx, principal, "environment.delete", ("environment", environment_id))


def _archived(environment_id: str) -> InvalidRequest:
    return InvalidRequest(f"environment {environment_id!r} is archived", details={"error_code": "environment_archived"})


def _require_scope(fields: Fields) -> None:
    if fields.given("scope") and fields.one_of("scope", "organization", "account") == "account":
        raise InvalidRequest("only organization is supported", field=fields.at("scope"))


async def _locked(tx: AsyncConnection, principal: Principal, environment_id: str) -> Environment:
    statement = sa.select(table.c.id).where(owned(principal, table), table.c.id == environment_id)
    await tx.execute(for_update(tx.dialect.name, statement))
    return await get_environment(tx, principal, environment_id)


async def _set(tx: AsyncConnection, principal: Principal, environment_id: str, **values: Any) -> None:
    await tx.execute(table.update().where(owned(principal, table), table.c.id == environment_id).values(**values))


def _environment(row: Any) -> Environment:
    return Environment(
        id=row.id,
        name=row.name,
        description=row.description,
        config=row.config,
        metadata=row.metadata,
        created_at=row.created_at,
        updated_at=row.updated_at,
        archived_at=row.archived_at,
        workspace_id=row.workspace_id,
    )
