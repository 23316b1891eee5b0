"""How the routes of resources are described: one line each, the rest from the route itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from claude_wrapper.api.managed.resources import RESOURCE_ROUTES

_ERRORS: Final = ("400", "401", "403", "404", "409", "413", "429", "500", "503")
_TAGS: Final[Mapping[str, str]] = {
    "agents": "Agents",
    "environments": "Environments",
    "files": "Files",
    "mcp": "MCP servers",
    "vaults": "Vaults",
    "skills": "Skills",
    "memory_stores": "Memory stores",
}
_UPLOADS: Final = frozenset({("post", "/v1/files"), ("post", "/v1/skills"), ("post", "/v1/skills/{skill_id}/versions")})
_DOWNLOADS: Final[Mapping[str, str]] = {
    "/v1/files/{file_id}/content": "application/octet-stream",
    "/v1/skills/{skill_id}/versions/{version}/content": "application/zip",
}
_PAGE: Final = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "default": 20}},
    {"name": "page", "in": "query", "schema": {"type": "string"}, "description": "`next_page` of the page before."},
]


def describe_resources(errors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Paths of the OpenAPI document; `errors` is its response object by status."""
    paths: dict[str, dict[str, Any]] = {}
    for route in RESOURCE_ROUTES:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _operation(method.lower(), route.path, route.endpoint.__doc__ or "")
            found = {status: errors[status] for status in _ERRORS if status in errors}
            operation["responses"] = {"200": _success(method.lower(), route.path), **found}
            paths.setdefault(route.path, {})[method.lower()] = operation
    return paths


def _operation(method: str, path: str, summary: str) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if method == "get" and not path.endswith(("}", "/content")):
        parameters += _PAGE
    operation: dict[str, Any] = {
        "summary": summary.splitlines()[0].rstrip("."),
        "tags": [_TAGS[path.split("/")[2]]],
        "parameters": parameters,
    }
    if method == "post":
        kind = "multipart/form-data" if (method, path) in _UPLOADS else "application/json"
        operation["requestBody"] = {"required": False, "content": {kind: {"schema": {"type": "object"}}}}
    return operation


def _success(method: str, path: str) -> dict[str, Any]:
    if method == "get" and path in _DOWNLOADS:
        return {"description": "The bytes.", "content": {_DOWNLOADS[path]: {"schema": {"format": "binary"}}}}
    return {"description": "The object.", "content": {"application/json": {"schema": {"type": "object"}}}}
