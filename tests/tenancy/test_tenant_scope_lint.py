"""Every query on tenant data names whose data it is; what the lint itself finds and lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import claude_wrapper
from tenant_scope import problems, problems_of_project

# Functions that the server calls for itself, with the organisation from a row or a principal that their caller checked.
# This list may only become shorter: write `# tenant-scope: <reason>` above the function and remove it here.
SERVER_SIDE = {
    "vault/rotation.py _not_yet": "rotation of the master key goes over all organisations",
    "vault/rotation.py _replace": "rotation of the master key goes over all organisations",
    "vault/rotation.py _retire": "master keys belong to the server",
    "limits/alerts.py _claim": "alerts are raised by the server; the organisation comes from the budget",
    "limits/alerts.py _unclaim": "alerts are raised by the server; the organisation comes from the budget",
    "limits/book.py _limits": "the rules of one organisation, for its own admission",
    "limits/book.py _budgets": "the rules of one organisation, for its own admission",
    "limits/book.py _any_session_budget": "the rules of one organisation, for its own admission",
    "usage/export.py _due": "the operator's export goes over all organisations",
    "usage/export.py _pieces": "the operator's export goes over all organisations",
    "usage/prices.py _read": "the prices of the organisation whose call is priced",
    "usage/reports.py spent": "what budgets ask, for the organisation that they belong to",
    "usage/rollups.py rebuild": "sums are rebuilt over all organisations",
}


def test_every_query_on_tenant_data_names_the_principal() -> None:
    found = problems_of_project(Path(claude_wrapper.__file__).parent)
    places = {_place(problem): problem for problem in found}
    assert [problem for place, problem in places.items() if place not in SERVER_SIDE] == []
    assert sorted(SERVER_SIDE.keys() - places.keys()) == [], "no longer needed: remove from SERVER_SIDE"


def _place(problem: str) -> str:
    where, function, _ = problem.split(":", maxsplit=1)[0], problem.split(" ")[1].rstrip(":"), None
    return f"{where} {function}"


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
