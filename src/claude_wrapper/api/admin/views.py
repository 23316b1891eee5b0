"""How records look on the wire: Anthropic's Admin API shapes, with what only this server knows beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from claude_wrapper.tenancy.audit import AuditEntry
from claude_wrapper.tenancy.invites import Invite
from claude_wrapper.tenancy.keyrecords import ApiKey
from claude_wrapper.tenancy.members import WorkspaceMember
from claude_wrapper.tenancy.orgs import Organization
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.tenancy.users import User
from claude_wrapper.tenancy.workspaces import Workspace
from claude_wrapper.vault.records import Credential

_ORG_ROLES: Final[Mapping[Role, str]] = {Role.VIEWER: "user"}
_WORKSPACE_ROLES: Final[Mapping[Role, str]] = {Role.VIEWER: "workspace_user"}


def organization(one: Organization) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "organization",
        "name": one.name,
        "is_staff": one.is_staff,
        "settings": dict(one.settings),
        "created_at": one.created_at,
        "deleted_at": one.deleted_at,
        "version": one.version,
    }


def api_key(one: ApiKey) -> dict[str, Any]:
    scope: dict[str, Any] = {"type": "organization"}
    if one.workspace_id is not None:
        scope = {"type": "workspace", "workspace_id": one.workspace_id}
    return {
        "id": one.id,
        "type": "api_key",
        "name": one.name,
        "status": str(one.status),
        "partial_key_hint": one.hint,
        "scope": scope,
        "workspace_id": one.workspace_id,
        "principal": None if one.user_id is None else {"type": "user_actor", "user_id": one.user_id},
        "created_by": None if one.created_by_id is None else {"id": one.created_by_id, "type": one.created_by_kind},
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "last_used_at": one.last_used_at,
        "role": str(one.role),
        "scopes": one.scopes,
        "allowed_models": one.allowed_models,
        "limits": dict(one.limits),
        "replaces": one.replaces,
        "is_operator": one.is_operator,
        "version": one.version,
    }


def user(one: User) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "user",
        "email": one.email,
        "name": one.name,
        "role": _ORG_ROLES.get(one.role, str(one.role)),
        "added_at": one.added_at,
        "disabled_at": one.disabled_at,
        "version": one.version,
    }


def invite(one: Invite) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "invite",
        "email": one.email,
        "role": _ORG_ROLES.get(one.role, str(one.role)),
        "status": str(one.status),
        "invited_at": one.invited_at,
        "expires_at": one.expires_at,
        "accepted_at": one.accepted_at,
        "rbac_group_ids": [],
    }


def workspace(one: Workspace) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "workspace",
        "name": one.name,
        "display_color": one.display_color,
        "tags": dict(one.tags),
        "is_default": one.is_default,
        "created_at": one.created_at,
        "archived_at": one.archived_at,
        "compartment_id": one.id,
        "data_residency": {
            "workspace_geo": "us",
            "allowed_inference_geos": "unrestricted",
            "default_inference_geo": "global",
        },
        "external_key_id": None,
        "version": one.version,
    }


def member(one: WorkspaceMember) -> dict[str, Any]:
    return {
        "type": "workspace_member",
        "workspace_id": one.workspace_id,
        "user_id": one.user_id,
        "workspace_role": _WORKSPACE_ROLES.get(one.role, f"workspace_{one.role}"),
        "added_at": one.added_at,
        "version": one.version,
    }


def credential(one: Credential) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "credential",
        "kind": str(one.kind),
        "provider": one.provider,
        "name": one.name,
        "workspace_id": one.workspace_id,
        "user_id": one.user_id,
        "base_url": one.base_url,
        "config": dict(one.config),
        "hint": one.hint,
        "rank": one.rank,
        "named_only": one.named_only,
        "status": str(one.status),
        "problem": one.problem,
        "expires_at": one.expires_at,
        "created_at": one.created_at,
        "updated_at": one.updated_at,
        "version": one.version,
    }


def audit_entry(one: AuditEntry) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": "audit_entry",
        "created_at": one.created_at,
        "actor": {"type": one.actor_kind, "id": one.actor_id},
        "action": one.action,
        "target": {"type": one.target_kind, "id": one.target_id},
        "before": one.before,
        "after": one.after,
        "address": one.origin.address,
        "user_agent": one.origin.user_agent,
        "request_id": one.origin.request_id,
    }
