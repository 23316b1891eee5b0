"""Every query on tenant data names whose data it is; what the lint itself finds and lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import claude_wrapper
from tenant_scope import problems, problems_of_project


def test_every_query_on_tenant_data_names_the_principal() -> None:
    assert problems_of_project(Path(claude_wrapper.__file__).parent) == []


HEAD = "import sqlalchemy as sa\nfrom claude_wrapper.storage.tables.tenancy import api_keys\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("async def f(tx, key):\n return sa.select(api_keys).where(api_keys.c.id == key)\n", "without a principal"),
        ("async def f(tx, principal):\n return sa.select(api_keys)\n", "does not name"),
        ("async def f(tx, principal, x):\n return sa.select(api_keys).where(api_keys.c.id == x)\n", "does not name"),
        (
            "async def f(tx, principal, x):\n return api_keys.update().values(a=principal.org).where(x)\n",
            "does not name",
        ),
        ("async def f(tx, principal, x):\n return api_keys.delete().where(x)\n", "does not name"),
        ("async def f(principal, tx):\n return api_keys.delete().where(owned(principal))\n", "first and second"),
        ("async def f(tx, x, principal):\n return api_keys.delete().where(owned(principal))\n", "first and second"),
        ("class A:\n async def f(self, tx):\n  return sa.delete(api_keys)\n", "without a principal"),
        ("async def f(tx):\n # tenant-scope: too late here\n return sa.delete(api_keys)\n", "without a principal"),
        ("# tenant-scope:\nasync def f(tx):\n return sa.delete(api_keys)\n", "without a principal"),
    ],
)
def test_the_lint_finds(body: str, says: str) -> None:
    found = problems(HEAD + body, "m.py")
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    "body",
    [
        "async def f(tx, principal, x):\n return sa.select(api_keys).where(owned(principal, api_keys), x).limit(1)\n",
        "async def f(tx, principal):\n mine = owned(principal)\n return sa.select(api_keys).where(mine)\n",
        "async def f(tx, principal):\n return api_keys.update().values(a=1).where(api_keys.c.org_id == principal.org)\n",
        "# tenant-scope: only the operator\nasync def f(tx):\n return sa.select(api_keys)\n",
        "def f(values, more):\n values.update(more)\n return values\n",
    ],
)
def test_the_lint_lets_pass(body: str) -> None:
    assert problems(HEAD + body, "m.py") == []
