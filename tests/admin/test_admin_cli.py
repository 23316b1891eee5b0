"""The command line: the sequence of the documentation as a script, and each command."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from claude_wrapper.app.offline import opened
from claude_wrapper.cli import main
from claude_wrapper.clock import SystemClock
from claude_wrapper.config import Settings
from claude_wrapper.errors import AuthenticationFailed
from claude_wrapper.limits.records import list_budgets
from claude_wrapper.sessions.resources.environments import create_environment
from claude_wrapper.sessions.resources.values import Fields
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.tenancy.audit import list_audit_entries
from claude_wrapper.tenancy.keyring import KeyRing
from claude_wrapper.tenancy.orgs import list_organizations
from claude_wrapper.tenancy.workerring import WorkerRing
from claude_wrapper.vault.resolve import Resolver

DOCUMENT = Path(__file__).parents[2] / "docs" / "tenants.md"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CLAUDE_WRAPPER_DATA_DIR", str(data))

    def run(*argv: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, ["admin", *argv], input=stdin)

    return run


def looking(data: Path, look: Any, **settings: Any) -> Any:
    async def run() -> Any:
        async with opened(Settings(data_dir=data, **settings)) as offline:
            return await look(offline)

    return asyncio.run(run())


def test_the_sequence_of_the_documentation_makes_two_organisations_with_a_key_and_a_budget_each(
    data: Path, tmp_path: Path
) -> None:
    block = re.search(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) < 10
    assert lines[-1] == "claude-wrapper serve"
    for name in ("Acme", "Globex"):
        (tmp_path / f"{name}.upstream").write_text(f"sk-ant-{name}-0123456789abcdef\n")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "CLAUDE_WRAPPER_DATA_DIR": str(data), "HOME": str(tmp_path)}
    script = "set -eu\n" + "\n".join(lines[:-1])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "sk-ant" not in done.stdout + done.stderr

    async def look(offline: Any) -> None:
        ring = KeyRing(offline.database, offline.pepper, SystemClock())
        resolver = Resolver(offline.database, offline.org_keys, SystemClock())
        for name in ("Acme", "Globex"):
            principal = await ring.authenticate((tmp_path / f"{name}.key").read_text().strip())
            assert principal.may("write:messages")
            assert (await resolver.lease(principal)).secret == f"sk-ant-{name}-0123456789abcdef"
            async with offline.database.read() as tx:
                (budget,) = await list_budgets(tx, offline.operator.acting_in(principal.org))
            assert (budget.cap_micros, str(budget.period), str(budget.action)) == (50_000_000, "month", "block")
        async with offline.database.read() as tx:
            assert len((await list_organizations(tx, offline.operator, PageRequest())).data) == 2

    looking(data, look)


def test_every_command_says_on_standard_output_only_what_a_script_needs(run: Any, data: Path) -> None:
    org = run("org", "create", "Acme")
    assert re.fullmatch(r"org_\w{26}\n", org.stdout)
    org_id = org.stdout.strip()
    assert re.fullmatch(r"wrkspc_\w{26}\n", run("workspace", "create", org_id, "Lab").stdout)
    user = run("user", "Acme", "ann@example.com").stdout.strip()
    assert re.fullmatch(r"user_\w{26}", user)
    assert re.fullmatch(r"[\w-]{43}\n", run("invite", "Acme", "bob@example.com", "--role", "viewer").stdout)
    made = run("key", "create", "Acme", "--user", "ann@example.com", "--limits", "requests=100/hour", "--days", "30")
    assert re.fullmatch(r"sk-cw-\w{26}-[\w-]{43}\n", made.stdout)
    key_id, status, role, *_ = run("key", "list", "Acme").stdout.split("\t")
    assert (status, role) == ("active", "developer")
    assert run("limits", "set", "Acme", "requests=5", "--scope", "key", "--subject", key_id).exit_code == 0
    rotated = run("key", "rotate", "Acme", key_id, "--overlap-hours", "1")
    assert rotated.stdout.startswith("sk-cw-")
    assert run("key", "revoke", "Acme", key_id).exit_code == 0
    assert {line.split("\t")[1] for line in run("key", "list", "Acme").stdout.splitlines()} == {"active", "archived"}
    first = run("budget", "set", "Acme", "--dollars", "50")
    assert run("budget", "set", "Acme", "--dollars", "12.5", "--action", "warn").stdout == first.stdout
    assert run("org", "list").stdout == f"{org_id}\tAcme\n"

    async def look(offline: Any) -> list[str]:
        async with offline.database.read() as tx:
            page = await list_audit_entries(tx, offline.operator.acting_in(org_id), PageRequest(limit=100))
        assert {entry.actor_kind for entry in page.data} == {"operator"}
        return [entry.action for entry in reversed(page.data)]

    assert looking(data, look) == [
        *("organization.create", "workspace.create", "user.add", "invite.create", "api_key.create", "api_key.update"),
        *("api_key.rotate", "api_key.revoke", "budget.create", "budget.update"),
    ]


def test_a_secret_is_read_from_standard_input_and_replaces_the_one_of_the_same_name(run: Any, data: Path) -> None:
    run("org", "create", "Acme")
    first = run("credential", "set", "Acme", stdin="sk-ant-first-0123456789\n")
    again = run("credential", "set", "Acme", stdin="sk-ant-again-0123456789\n")
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert run("credential", "set", "Acme", stdin="").exit_code == 2
    content = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert b"sk-ant-again" not in content


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("key", "create", "Nobody"), "there is no organisation 'Nobody'"),
        (("key", "create", "Acme", "--role", "king"), "role: unknown role 'king'"),
        (("key", "create", "Acme", "--limits", "speed=1"), "no such limit"),
        (("budget", "set", "Acme", "--dollars", "5", "--scope", "key"), "--subject"),
        (("budget", "set", "Acme", "--dollars", "5", "--scope", "key", "--subject", "apikey_x"), "there is no key"),
        (("budget", "set", "Acme", "--dollars", "5", "--per", "year"), "per: use one of day, week, month, total"),
        (("limits", "set", "Acme", "requests=5", "--scope", "user", "--subject", "user_x"), "there is no user"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(run: Any, argv: tuple[str, ...], says: str) -> None:
    run("org", "create", "Acme")
    done = run(*argv)
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_organisations_of_one_name_must_be_told_apart_by_id(run: Any) -> None:
    ids = {run("org", "create", "Acme").stdout.strip() for _ in range(2)}
    done = run("key", "create", "Acme")
    assert done.exit_code == 2
    assert all(one in done.stderr for one in ids)


def test_partners_of_the_cache_are_named_by_name_or_id_and_taken_back(run: Any) -> None:
    ours, theirs, third = (run("org", "create", name).stdout.strip() for name in ("Acme", "Globex", "Initech"))

    def named(*argv: str) -> Any:
        done = run("policy", *argv)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)["cache_share_with"]

    assert named("show", "Acme") == []
    assert named("set", "Acme", "--cache-share-with", "Globex", "--cache-share-with", third) == [theirs, third]
    assert named("set", "Acme", "--cache-seconds", "60") == [theirs, third]
    assert named("show", "Globex") == []
    assert named("set", "Acme", "--cache-share-with", "none") == []
    for argv, says in [(("Nobody",), "Nobody"), ((ours,), "itself"), (("none", "Nobody"), "Nobody")]:
        options = [part for name in argv for part in ("--cache-share-with", name)]
        refused = run("policy", "set", "Acme", *options)
        assert refused.exit_code == 2
        assert says in refused.stderr


def test_the_master_key_changes_in_two_steps_and_the_old_one_can_then_go(run: Any, data: Path) -> None:
    run("org", "create", "Acme")
    run("credential", "set", "Acme", stdin="sk-ant-first-0123456789\n")
    file = data / "master.key"
    (old,) = file.read_text().split()
    added = run("rotate-master-key", "--add")
    assert added.exit_code == 0, added.output
    new, kept = file.read_text().split()
    assert kept == old
    assert file.stat().st_mode & 0o777 == 0o600
    assert "1 data keys are wrapped" in run("rotate-master-key").stdout
    file.write_text(new + "\n")
    assert run("credential", "set", "Acme", stdin="sk-ant-third-0123456789\n").exit_code == 0
    file.write_text(old + "\n")
    wrong = run("org", "list")
    assert wrong.exit_code == 2
    assert "master key" in wrong.stderr


def test_a_wrong_master_key_is_refused_before_anything_is_changed(run: Any, data: Path) -> None:
    run("org", "create", "Acme")
    (data / "master.key").write_text(base64.b64encode(os.urandom(32)).decode())
    done = run("org", "create", "Globex")
    assert done.exit_code == 2
    assert "is not the one that this database was made with" in done.stderr


def test_postgres_is_refused_until_it_was_migrated(
    run: Any, empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAUDE_WRAPPER_DATABASE_URL", empty_postgres_url)
    done = run("org", "create", "Acme")
    assert done.exit_code == 2
    assert "claude-wrapper migrate" in done.stderr
    assert "migrated from nothing to" in CliRunner().invoke(main, ["migrate"]).stdout
    assert run("org", "create", "Acme").exit_code == 0
    assert "the database is at" in CliRunner().invoke(main, ["migrate"]).stdout


def test_a_database_that_is_away_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_WRAPPER_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    done = run("org", "list")
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_keys_of_a_self_hosted_environment_are_made_listed_and_revoked(data: Path, run: Any) -> None:
    org = run("org", "create", "Acme").stdout.strip()

    async def make(offline: Any) -> str:
        async with offline.database.transaction() as tx:
            inside = offline.operator.acting_in(org)
            fields = Fields({"name": "theirs", "config": {"type": "self_hosted"}})
            return str((await create_environment(tx, inside, offline.scribe, fields)).id)

    environment = looking(data, make)
    made = run("environment-key", "create", "Acme", environment, "--name", "laptop", "--days", "30")
    secret = made.stdout.strip()
    assert re.fullmatch(r"sk-env-[0-9a-z]+-[\w-]{43}", secret), made.output
    listed = run("environment-key", "list", "Acme", "--environment", environment).stdout.split("\t")
    assert listed[1:3] + listed[4:] == [environment, "active", "laptop\n"]

    async def authenticates(offline: Any) -> bool:
        ring = WorkerRing(offline.database, offline.pepper, SystemClock())
        try:
            grant = (await ring.authenticate(secret)).worker
        except AuthenticationFailed:
            return False
        return grant is not None and grant.environment == environment

    assert looking(data, authenticates)
    assert run("environment-key", "revoke", "Acme", listed[0]).exit_code == 0
    assert not looking(data, authenticates)
    assert "revoked" in run("environment-key", "list", "Acme").stdout
