"""`claude-wrapper admin …`: organisations, keys, people, credentials, budgets and limits, straight in the database.

What a script needs (an identifier, a secret) goes to standard output, alone; what a person reads goes to standard error.
Secrets are read from standard input or a file, never from the command line, where every user of the machine sees them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

T = TypeVar("T")

_SECRET_FIELDS = {"oauth": "access_token", "bedrock": "api_key", "vertex": "service_account_json"}


@click.group()
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file with settings.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where everything is kept.")
@click.pass_context
def admin(ctx: click.Context, config: Path | None, data_dir: Path | None) -> None:
    """Manage organisations, keys, people, credentials, budgets and limits, directly in the database."""
    from claude_wrapper import config as settings

    ctx.obj = settings.load(os.environ, file=config, data_dir=data_dir)


def _run(settings: Any, work: Callable[[Any], Awaitable[T]]) -> T:
    """Open what the settings name, do the work, close it."""
    from claude_wrapper.app.offline import opened

    async def run() -> T:
        async with opened(settings) as offline:
            return await work(offline)

    return asyncio.run(run())


def _say(text: str) -> None:
    click.secho(text, err=True, dim=True)


async def _inside(offline: Any, name: str) -> Any:
    """The operator, acting in the organisation with this id or name."""
    from claude_wrapper.cli.finding import organization

    return offline.operator.acting_in((await organization(offline, name)).id)


# Organisations ----------------------------------------------------------------------------------------------------------


@admin.group()
def org() -> None:
    """Organisations: the tenants."""


@org.command("create")
@click.argument("name")
@click.option("--staff", is_flag=True, help="It may fall back on the operator's own upstream credential.")
@click.pass_obj
def org_create(settings: Any, name: str, staff: bool) -> None:
    """Create an organisation; prints its id."""
    from claude_wrapper.tenancy.orgs import create_organization

    async def work(offline: Any) -> str:
        async with offline.database.transaction() as tx:
            return (await create_organization(tx, offline.operator, offline.scribe, name, is_staff=staff)).id

    click.echo(_run(settings, work))


@org.command("list")
@click.pass_obj
def org_list(settings: Any) -> None:
    """List organisations: id, name."""
    from claude_wrapper.cli.finding import organizations

    for one in _run(settings, organizations):
        click.echo(f"{one.id}\t{one.name}{'  (staff)' if one.is_staff else ''}")


@org.command("security")
@click.argument("organization")
@click.argument("level", required=False)
@click.pass_obj
def org_security(settings: Any, organization: str, level: str | None) -> None:
    """Set an organisation's security level; without one it has the server's again."""
    from claude_wrapper.cli.changes import set_security_level

    _say(_run(settings, lambda offline: set_security_level(offline, organization, level, settings)))


@admin.group()
def workspace() -> None:
    """Workspaces: groups of keys and sessions inside an organisation."""


@workspace.command("create")
@click.argument("organization")
@click.argument("name")
@click.pass_obj
def workspace_create(settings: Any, organization: str, name: str) -> None:
    """Create a workspace; prints its id."""
    from claude_wrapper.tenancy.workspaces import create_workspace

    async def work(offline: Any) -> str:
        boss = await _inside(offline, organization)
        async with offline.database.transaction() as tx:
            return (await create_workspace(tx, boss, offline.scribe, name)).id

    click.echo(_run(settings, work))


# Keys -------------------------------------------------------------------------------------------------------------------


@admin.group()
def key() -> None:
    """API keys."""


@key.command("create")
@click.argument("organization")
@click.option("--name", default="key", show_default=True)
@click.option("--role", default="developer", show_default=True, help="owner, admin, developer, billing or viewer.")
@click.option("--workspace", help="Only for this workspace (id).")
@click.option("--user", help="Acts for this user (id or address).")
@click.option("--model", "models", multiple=True, help="Only these models; repeat it. May end in `*`.")
@click.option("--limits", default="", help="As in `requests=100/hour, concurrent_turns=4`.")
@click.option("--days", type=click.IntRange(1, 3650), help="Expires after this many days.")
@click.pass_obj
def key_create(settings: Any, /, organization: str, **given: Any) -> None:
    """Create an API key; prints its secret, this once."""
    from claude_wrapper.cli.changes import create_key

    made = _run(settings, lambda offline: create_key(offline, organization, **given))
    click.echo(made.secret)
    _say(f"{made.key.id} ({made.key.role}): shown once, it is kept only as a hash")


@key.command("list")
@click.argument("organization")
@click.pass_obj
def key_list(settings: Any, organization: str) -> None:
    """List API keys: id, status, role, hint, name."""
    from claude_wrapper.cli.finding import api_keys

    async def work(offline: Any) -> Any:
        return await api_keys(offline, await _inside(offline, organization))

    for one in _run(settings, work):
        click.echo(f"{one.id}\t{one.status}\t{one.role}\t{one.hint}\t{one.name}")


@key.command("revoke")
@click.argument("organization")
@click.argument("key_id")
@click.pass_obj
def key_revoke(settings: Any, organization: str, key_id: str) -> None:
    """Revoke an API key for good."""
    from claude_wrapper.tenancy.apikeys import revoke_api_key

    async def work(offline: Any) -> None:
        boss = await _inside(offline, organization)
        async with offline.database.transaction() as tx:
            await revoke_api_key(tx, boss, offline.scribe, key_id)

    _run(settings, work)
    _say(f"{key_id} is revoked; a running server without Redis learns of it within 30 seconds")


@key.command("rotate")
@click.argument("organization")
@click.argument("key_id")
@click.option("--overlap-hours", type=click.IntRange(0, 720), default=0, help="The old one stays good for this long.")
@click.pass_obj
def key_rotate(settings: Any, organization: str, key_id: str, overlap_hours: int) -> None:
    """Replace an API key; prints the new one's secret."""
    from datetime import timedelta

    from claude_wrapper.tenancy.apikeys import rotate_api_key

    async def work(offline: Any) -> Any:
        boss = await _inside(offline, organization)
        overlap = timedelta(hours=overlap_hours)
        async with offline.database.transaction() as tx:
            return await rotate_api_key(tx, boss, offline.scribe, offline.pepper, key_id, overlap=overlap)

    made = _run(settings, work)
    click.echo(made.secret)
    _say(f"{made.key.id} replaces {key_id}")


@admin.group("environment-key")
def environment_key() -> None:
    """Keys of self-hosted environments: what their workers poll with."""


@environment_key.command("create")
@click.argument("organization")
@click.argument("environment_id")
@click.option("--name", default="worker", show_default=True)
@click.option("--days", type=click.IntRange(1, 3650), help="Expires after this many days.")
@click.pass_obj
def environment_key_create(settings: Any, organization: str, environment_id: str, name: str, days: int | None) -> None:
    """Create a key for a self-hosted environment's workers; prints its secret, this once."""
    from datetime import timedelta

    from claude_wrapper.tenancy.environmentkeys import create_environment_key

    async def work(offline: Any) -> Any:
        boss = await _inside(offline, organization)
        ends = None if days is None else offline.scribe.now() + timedelta(days=days)
        async with offline.database.transaction() as tx:
            return await create_environment_key(
                tx, boss, offline.scribe, offline.pepper, environment_id, name=name, expires_at=ends
            )

    made = _run(settings, work)
    click.echo(made.secret)
    _say(f"{made.key.id}: shown once, it is kept only as a hash")


@environment_key.command("list")
@click.argument("organization")
@click.option("--environment", help="Only of this environment (id).")
@click.pass_obj
def environment_key_list(settings: Any, organization: str, environment: str | None) -> None:
    """List environment keys: id, environment, status, hint, name."""
    from claude_wrapper.cli.finding import environment_keys

    async def work(offline: Any) -> Any:
        return await environment_keys(offline, await _inside(offline, organization), environment)

    for one, status in _run(settings, work):
        click.echo(f"{one.id}\t{one.environment_id}\t{status}\t{one.hint}\t{one.name}")


@environment_key.command("revoke")
@click.argument("organization")
@click.argument("key_id")
@click.pass_obj
def environment_key_revoke(settings: Any, organization: str, key_id: str) -> None:
    """Revoke an environment key for good."""
    from claude_wrapper.tenancy.environmentkeys import revoke_environment_key

    async def work(offline: Any) -> None:
        boss = await _inside(offline, organization)
        async with offline.database.transaction() as tx:
            await revoke_environment_key(tx, boss, offline.scribe, key_id)

    _run(settings, work)
    _say(f"{key_id} is revoked; what its workers serve at the moment ends with their leases")


# People -----------------------------------------------------------------------------------------------------------------


@admin.command()
@click.argument("organization")
@click.argument("email")
@click.option("--role", default="developer", show_default=True)
@click.option("--name", default="")
@click.pass_obj
def user(settings: Any, organization: str, email: str, role: str, name: str) -> None:
    """Make a person a member; prints the user's id."""
    from claude_wrapper.tenancy.scopes import parse_role
    from claude_wrapper.tenancy.users import add_user

    async def work(offline: Any) -> str:
        boss = await _inside(offline, organization)
        async with offline.database.transaction() as tx:
            made = await add_user(tx, boss, offline.scribe, email=email, name=name, role=parse_role(role))
            return made.id

    click.echo(_run(settings, work))


@admin.command()
@click.argument("organization")
@click.argument("email")
@click.option("--role", default="developer", show_default=True)
@click.pass_obj
def invite(settings: Any, organization: str, email: str, role: str) -> None:
    """Invite a person; prints the token to send to them, this once."""
    from claude_wrapper.tenancy.invites import create_invite
    from claude_wrapper.tenancy.scopes import parse_role

    async def work(offline: Any) -> Any:
        boss = await _inside(offline, organization)
        async with offline.database.transaction() as tx:
            return await create_invite(tx, boss, offline.scribe, email=email, role=parse_role(role))

    made = _run(settings, work)
    click.echo(made.token)
    _say(f"{made.invite.id}: good until {made.invite.expires_at:%Y-%m-%d}; POST /v1/organizations/invites/accept")


# Credentials, budgets, limits -------------------------------------------------------------------------------------------


@admin.group()
def credential() -> None:
    """Upstream credentials, in the vault."""


@credential.command("set")
@click.argument("organization")
@click.option("--kind", default="api_key", show_default=True, help="api_key, oauth, bedrock, vertex, foundry, custom.")
@click.option("--name", default="default", show_default=True, help="One of this name gets the new secret.")
@click.option(
    "--file", type=click.File("r"), default="-", help="Where the secret is read from; default: standard input."
)
@click.option("--base-url", help="For the kinds that need one.")
@click.option("--set", "config", multiple=True, metavar="NAME=VALUE", help="region=…, resource=…; repeat it.")
@click.option("--workspace", help="Only for this workspace (id).")
@click.option("--user", help="Only for this user (id or address).")
@click.pass_obj
def credential_set(settings: Any, /, organization: str, file: Any, **given: Any) -> None:
    """Keep an upstream credential; prints its id. The secret comes from standard input or a file."""
    from claude_wrapper.cli.changes import set_credential

    if file is sys.stdin and sys.stdin.isatty():
        _say("paste the secret, then press Enter and Control-D")
    secret = file.read().strip()
    if not secret:
        raise click.UsageError("no secret came on standard input (or from --file)")
    field = _SECRET_FIELDS.get(given["kind"], "api_key")
    made = _run(settings, lambda offline: set_credential(offline, organization, {field: secret}, **given))
    click.echo(made.id)


@admin.group()
def budget() -> None:
    """Budgets: caps on what may be spent."""


@budget.command("set")
@click.argument("organization")
@click.option("--dollars", type=float, required=True)
@click.option("--per", default="month", show_default=True, help="day, week, month or total.")
@click.option("--action", default="block", show_default=True, help="warn, block or pause.")
@click.option("--scope", default="organization", show_default=True, help="organization, workspace, user, key, session.")
@click.option("--subject", help="The id that the scope is about.")
@click.pass_obj
def budget_set(settings: Any, /, organization: str, **given: Any) -> None:
    """Set a budget, new or in place of the one for that period; prints its id."""
    from claude_wrapper.cli.changes import set_budget

    click.echo(_run(settings, lambda offline: set_budget(offline, organization, **given)).id)


@admin.group()
def limits() -> None:
    """Rate limits and limits on concurrency."""


@limits.command("set")
@click.argument("organization")
@click.argument("text")
@click.option("--scope", default="organization", show_default=True, help="organization, workspace, user or key.")
@click.option("--subject", help="The id that the scope is about.")
@click.pass_obj
def limits_set(settings: Any, organization: str, text: str, scope: str, subject: str | None) -> None:
    """Replace limits, as in `requests=100/hour, concurrent_turns=4`; an empty text takes them away."""
    from claude_wrapper.cli.changes import set_limits_of

    _run(settings, lambda offline: set_limits_of(offline, organization, text, scope=scope, subject=subject))


# Policies ---------------------------------------------------------------------------------------------------------------


@admin.group()
def policy() -> None:
    """Fall-backs, the cache of answers, the version of the CLI."""


@policy.command("show")
@click.argument("organization")
@click.pass_obj
def policy_show(settings: Any, organization: str) -> None:
    """Print an organisation's policies as JSON."""
    click.echo(_policies(settings, organization, {}))


@policy.command("set")
@click.argument("organization")
@click.option(
    "--fallback",
    "fallbacks",
    multiple=True,
    metavar="MODEL=OTHER,…",
    help="Models to ask when MODEL (`*`: any) is overloaded; repeat it. `none` takes all away.",
)
@click.option(
    "--fallback-credentials/--no-fallback-credentials", default=None, help="Another credential after 401 or 429."
)
@click.option("--cache-answers", help="off, asked or deterministic.")
@click.option("--cache-seconds", type=int, help="How long an answer is kept.")
@click.option(
    "--cache-share-with",
    multiple=True,
    metavar="ORGANIZATION",
    help="Share kept answers with it, as far as it names this one too; repeat it. `none`: with nobody.",
)
@click.option("--cli-version", help="Pin the CLI; `any` takes the pin away.")
@click.pass_obj
def policy_set(
    settings: Any, /, organization: str, fallbacks: tuple[str, ...], cache_share_with: tuple[str, ...], **given: Any
) -> None:
    """Change some policies; prints all of them as JSON."""
    changes = {name: value for name, value in given.items() if value is not None}
    if cache_share_with:
        changes["cache_share_with"] = [name for name in cache_share_with if name != "none"]
    if fallbacks:
        pairs = [text.partition("=") for text in fallbacks if text != "none"]
        changes["fallback_models"] = {model.strip(): others.split(",") for model, _, others in pairs}
    if changes.get("cli_version") == "any":
        changes["cli_version"] = None
    click.echo(_policies(settings, organization, changes))


def _policies(settings: Any, organization: str, changes: dict[str, Any]) -> str:
    import json

    from claude_wrapper.tenancy.policybook import get_policies, set_policies

    async def work(offline: Any) -> dict[str, Any]:
        boss = await _inside(offline, organization)
        if partners := changes.get("cache_share_with"):
            changes["cache_share_with"] = [(await _inside(offline, name)).org for name in partners]
        async with offline.database.transaction() as tx:
            if changes:
                return (await set_policies(tx, boss, offline.scribe, changes)).to_json()
            return (await get_policies(tx, boss)).to_json()

    return json.dumps(_run(settings, work), indent=2)


@admin.command("rotate-master-key")
@click.option("--add", is_flag=True, help="First step: put a new key before the old one in the key file.")
@click.pass_obj
def rotate_master_key(settings: Any, add: bool) -> None:
    """Change the vault's master key: `--add`, restart the servers, then without `--add`."""
    from claude_wrapper.app import offline

    if add:
        click.echo(offline.add_master_key(settings))
        _say("restart every server now, so that all of them know both keys; then run this again without --add")
        return
    done = asyncio.run(offline.rotate(settings))
    click.echo(f"{done.rewrapped} data keys are wrapped with {done.primary}")
    for key_id in done.retired:
        _say(f"{key_id} is needed no more: take it out of the key file (or setting) and restart the servers")


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file with settings.")
def migrate(config: Path | None) -> None:
    """Bring the database to this version's schema (Postgres: before the servers start)."""
    from claude_wrapper import config as settings
    from claude_wrapper.app import offline

    before, after = asyncio.run(offline.migrate(settings.load(os.environ, file=config)))
    click.echo(f"the database is at {after}" if before == after else f"migrated from {before or 'nothing'} to {after}")
