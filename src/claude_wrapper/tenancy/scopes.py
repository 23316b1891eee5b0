"""What each role may do: one table. `docs/scopes.md` is rendered from it, and a test compares the two.

A scope is `<verb>:<noun>`, as in Anthropic's Admin API (`write:members`). A principal's scopes are its role's, narrowed
by what its key was given. Nobody can hand on what they do not hold (`grantable`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from claude_wrapper.errors import InvalidRequest


class Role(enum.StrEnum):
    """What a person or key is in an organisation or workspace."""

    OWNER = "owner"
    ADMIN = "admin"
    DEVELOPER = "developer"
    BILLING = "billing"
    VIEWER = "viewer"


_O, _A, _D, _B, _V = Role.OWNER, Role.ADMIN, Role.DEVELOPER, Role.BILLING, Role.VIEWER

ROLE_MEANINGS: Mapping[Role, str] = MappingProxyType(
    {
        _O: "Everything in the organisation, its deletion included. There is always at least one.",
        _A: "Everything but the deletion of the organisation.",
        _D: "Runs agents and manages sessions, agents, files and keys that can do no more than a developer.",
        _B: "Reads usage and costs, sets budgets; runs nothing.",
        _V: "Reads; changes and runs nothing.",
    }
)


@dataclass(frozen=True, slots=True)
class Scope:
    """One thing that may be allowed, and the roles that hold it."""

    name: str
    allows: str
    roles: frozenset[Role]


def _scope(name: str, allows: str, *roles: Role) -> Scope:
    return Scope(name, allows, frozenset(roles))


SCOPES: tuple[Scope, ...] = (
    _scope("write:messages", "Run turns: Messages, Chat Completions, Responses, batches, token counts", _O, _A, _D),
    _scope("read:models", "List models", _O, _A, _D, _B, _V),
    _scope("read:sessions", "Read sessions, their events and results", _O, _A, _D, _V),
    _scope("write:sessions", "Create, drive, archive and delete sessions", _O, _A, _D),
    _scope("read:agents", "Read agents, environments, skills and memory stores", _O, _A, _D, _V),
    _scope("write:agents", "Change agents, environments, skills and memory stores", _O, _A, _D),
    _scope("read:files", "Read files", _O, _A, _D, _V),
    _scope("write:files", "Upload and delete files", _O, _A, _D),
    _scope("read:vaults", "List vaults and the names of credentials for tools", _O, _A, _D, _V),
    _scope("write:vaults", "Change vaults and credentials for tools", _O, _A, _D),
    _scope("read:jobs", "Read jobs, schedules and webhooks", _O, _A, _D, _V),
    _scope("write:jobs", "Change jobs, schedules and webhooks", _O, _A, _D),
    _scope("read:pool", "Read the state of one's own processes", _O, _A, _D, _V),
    _scope("read:organization", "Read the organisation", _O, _A, _D, _B, _V),
    _scope("write:organization", "Rename the organisation and change its settings", _O, _A),
    _scope("delete:organization", "Delete, restore and purge the organisation", _O),
    _scope("read:workspaces", "Read workspaces and their members", _O, _A, _D, _B, _V),
    _scope("write:workspaces", "Create, change and archive workspaces, and their members", _O, _A),
    _scope("read:members", "Read users and invites", _O, _A, _D, _B, _V),
    _scope("write:members", "Invite, change and remove users", _O, _A),
    _scope("read:api_keys", "Read API keys (never their secret)", _O, _A, _D),
    _scope("write:api_keys", "Create, change, rotate and revoke API keys", _O, _A, _D),
    _scope("read:credentials", "Read upstream credentials (never their secret)", _O, _A),
    _scope("write:credentials", "Add, change and remove upstream credentials", _O, _A),
    _scope("read:usage", "Read token counts and request counts", _O, _A, _D, _B, _V),
    _scope("read:costs", "Read costs and prices", _O, _A, _B),
    _scope("read:limits", "Read rate limits", _O, _A, _D, _B, _V),
    _scope("write:limits", "Change rate limits within what the operator allows", _O, _A),
    _scope("read:budgets", "Read budgets and what is left of them", _O, _A, _B),
    _scope("write:budgets", "Change budgets and their alerts", _O, _A, _B),
    _scope("read:audit", "Read the audit log", _O, _A),
    _scope("operate:server", "See and manage all organisations, the pool and the server: the operator alone"),
)

ALL_SCOPES = frozenset(scope.name for scope in SCOPES)
_BY_ROLE: Mapping[Role, frozenset[str]] = MappingProxyType(
    {role: frozenset(scope.name for scope in SCOPES if role in scope.roles) for role in Role}
)

# Names that Anthropic's Admin API uses for roles, and ours.
_ROLE_ALIASES: Mapping[str, Role] = MappingProxyType(
    {
        "primary_owner": _O,
        "membership_admin": _A,
        "claude_code_user": _D,
        "managed": _V,
        "user": _V,
        "workspace_admin": _A,
        "workspace_developer": _D,
        "workspace_restricted_developer": _D,
        "workspace_billing": _B,
        "workspace_user": _V,
    }
)


def scopes_of(role: Role) -> frozenset[str]:
    """All scopes of a role."""
    return _BY_ROLE[role]


def parse_role(value: str, *, field: str = "role") -> Role:
    """A role by our name or Anthropic's; raises InvalidRequest naming the field."""
    if value in _ROLE_ALIASES:
        return _ROLE_ALIASES[value]
    try:
        return Role(value)
    except ValueError:
        raise InvalidRequest(f"unknown role {value!r}; use one of {', '.join(Role)}", field=field) from None


def parse_scopes(values: Iterable[str], *, field: str = "scopes") -> frozenset[str]:
    """Known scopes; raises InvalidRequest naming the first unknown one."""
    wanted = frozenset(values)
    unknown = sorted(wanted - ALL_SCOPES)
    if unknown:
        raise InvalidRequest(f"unknown scope {unknown[0]!r}; docs/scopes.md lists them", field=field)
    return wanted


def render_markdown() -> str:
    """`docs/scopes.md`."""
    lines = [
        "# Roles and scopes",
        "",
        "Rendered from `claude_wrapper/tenancy/scopes.py`; a test compares them. Change the table there, then run",
        "`python -m claude_wrapper.tenancy.scopes > docs/scopes.md`.",
        "",
        "| Role | Meaning |",
        "|---|---|",
        *(f"| `{role}` | {meaning} |" for role, meaning in ROLE_MEANINGS.items()),
        "",
        "| Scope | Allows | " + " | ".join(f"`{role}`" for role in Role) + " |",
        "|---|---|" + ":-:|" * len(Role),
        *(
            f"| `{scope.name}` | {scope.allows} | "
            + " | ".join("×" if role in scope.roles else "" for role in Role)
            + " |"
            for scope in SCOPES
        ),
        "",
        "A key may be given fewer scopes than its role has. Nobody can give a role or a scope that they do not hold.",
        "A key that belongs to a workspace sees that workspace alone.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_markdown(), end="")  # noqa: T201 (this is the generator of the page)
