"""The Admin API's part of the OpenAPI document, generated from its table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from claude_wrapper.api.admin import TABLE
from claude_wrapper.api.admin.http import OPEN, OPERATOR, ORGANIZATION_HEADER, AdminRoute

_REF: Final = "#/components/schemas/{name}"
_ERRORS: Final = ("400", "401", "403", "404", "409", "500", "503")
_MEANINGS: Final[Mapping[str, str]] = {
    "400": "The request is not valid; the message names the field.",
    "401": "The API key is missing, wrong, expired or revoked.",
    "403": "The role or key does not have the scope.",
    "404": "There is no such thing, or it belongs to another organisation.",
    "409": "It was changed by somebody else meanwhile, or does not fit its present state.",
    "500": "The server failed.",
    "503": "The database cannot be reached.",
}


def paths() -> dict[str, dict[str, Any]]:
    """The paths, each with its methods."""
    found: dict[str, dict[str, Any]] = {}
    for row in TABLE:
        found.setdefault(row.path, {})[row.method.lower()] = _operation(row)
    return found


def schemas() -> dict[str, Any]:
    """The bodies."""
    kinds = list(dict.fromkeys(row.body for row in TABLE if row.body is not None))
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    return dict(components)


def _operation(row: AdminRoute) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}}
    operation: dict[str, Any] = {
        "summary": row.summary,
        "tags": ["Organisations"],
        "operationId": re.sub(r"\W+", "_", f"{row.method.lower()}{row.path}").strip("_"),
        "parameters": _parameters(row),
        "responses": {
            "200": {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}},
            **{status: {"description": _MEANINGS[status], **error} for status in _ERRORS},
        },
    }
    if row.scope == OPEN:
        operation["security"] = []
    else:
        who = "The operator alone." if row.scope == OPERATOR else f"Needs the scope `{row.scope}`."
        operation["description"] = who
        operation["x-scope"] = row.scope
    if row.body is not None:
        schema = {"$ref": _REF.format(name=row.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _parameters(row: AdminRoute) -> list[dict[str, Any]]:
    text = {"type": "string"}
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": text} for name in re.findall(r"{(\w+)}", row.path)
    ]
    for name in row.query:
        schema: dict[str, Any] = {"type": "array", "items": text} if name.endswith("[]") else text
        found.append({"name": name, "in": "query", "required": False, "schema": schema})
    if row.scope != OPEN:
        about = "The operator names the organisation to act in."
        found.append(
            {"name": ORGANIZATION_HEADER, "in": "header", "required": False, "description": about, "schema": text}
        )
    if row.method == "POST" and row.body is not None:
        about = "A create that is sent twice with the same key happens once (kept for 24 hours)."
        found.append(
            {"name": "idempotency-key", "in": "header", "required": False, "description": about, "schema": text}
        )
    return found
