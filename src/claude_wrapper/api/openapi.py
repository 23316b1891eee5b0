"""The OpenAPI document: FastAPI's for its own routes, plus the hot routes, which are described here by hand.

A test walks the route table and fails on a route that the document does not describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from claude_wrapper.api.admin import openapi as admin
from claude_wrapper.api.managed.openapi_resources import describe_resources
from claude_wrapper.api.managed.openapi_sessions import describe_sessions

_ERROR: Final = {"$ref": "#/components/schemas/Error"}
_MESSAGE: Final = {"$ref": "#/components/schemas/Message"}

_MEANINGS: Final[Mapping[str, str]] = {
    "400": "The request is not valid; the message names the field.",
    "401": "The API key is missing, wrong, expired or revoked.",
    "402": "A spending cap was reached.",
    "403": "The key, or this server's security level, does not allow it.",
    "404": "There is no such thing, or it belongs to somebody else.",
    "409": "The request does not fit the present state.",
    "413": "The body is too large.",
    "429": "A rate limit was reached; `retry-after` says when to come back.",
    "500": "The server failed.",
    "502": "The agent process or the model API failed.",
    "503": "The server is draining or the model API cannot be reached.",
    "504": "The agent or the model API did not answer in time.",
    "529": "The server or the model API is overloaded.",
}


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {
            "description": _MEANINGS[str(status)],
            "content": {"application/json": {"schema": _ERROR}},
        }
        for status in statuses
    }


_RUN_ERRORS: Final = _errors(400, 401, 402, 403, 404, 409, 413, 429, 500, 502, 503, 504, 529)

_PROCESS_HEADERS: Final = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "request-id": "Id of this request, also in errors and logs.",
        "cw-session-id": "The conversation; send it as `session_id` to continue by name.",
        "cw-process": "`warm` (the conversation's own process), `reused`, `spare` or `cold`.",
        "cw-process-pid": "Process id of the Claude CLI that answered.",
        "cw-cache": "`hit` or `miss`, where the shared cache was asked.",
        "cw-fallback-model": "The model that answered in place of the one that was asked for.",
        "cw-fallback-credential": "The credential that was shown in place of the first one.",
    }.items()
}

_CACHE_PARAMETER: Final = {
    "name": "cw-cache",
    "in": "header",
    "required": False,
    "description": "Whether the shared cache may answer; see docs/cache.md.",
    "schema": {"enum": ["use", "refresh", "bypass"]},
}

_CREDENTIAL_PARAMETER: Final = {
    "name": "cw-credential",
    "in": "header",
    "required": False,
    "description": "Id of the stored upstream credential that is to serve this request.",
    "schema": {"type": "string"},
}

_REQUEST_EXAMPLE: Final = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 1024,
    "messages": [{"role": "user", "content": "Hello!"}],
}

_METRICS: Final[dict[str, Any]] = {
    "get": {
        "summary": "Metrics for Prometheus",
        "responses": {
            "200": {
                "description": "Prometheus text or, by `Accept`, OpenMetrics; see docs/metrics.md.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **_errors(401, 403, 500),
        },
    }
}

_PATHS: Final[dict[str, dict[str, Any]]] = {
    "/metrics": _METRICS,
    "/api/metrics": _METRICS,
    "/": {
        "get": {
            "summary": "Overview",
            "description": "HTML for browsers, JSON otherwise.",
            "security": [],
            "responses": {"200": {"description": "What can be asked of this server."}},
        }
    },
    "/livez": {
        "get": {"summary": "The event loop answers", "security": [], "responses": {"200": {"description": "Alive."}}}
    },
    "/readyz": {
        "get": {
            "summary": "New work is welcome",
            "security": [],
            "responses": {
                "200": {"description": "Ready."},
                "503": {"description": "Draining, or a check that matters fails."},
            },
        }
    },
    "/health": {
        "get": {
            "summary": "Every check, by name",
            "security": [],
            "responses": {
                "200": {"description": "Healthy or degraded."},
                "503": {"description": "A check that matters fails; it is named."},
            },
        }
    },
    "/v1/messages": {
        "post": {
            "summary": "Create a Message",
            "description": "The Anthropic Messages API. Extensions: `session_id` names a conversation, `agent` asks for agent behaviour, `mcp_servers` gives the agent tools.",
            "parameters": [_CACHE_PARAMETER, _CREDENTIAL_PARAMETER],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/MessagesRequest"},
                        "example": _REQUEST_EXAMPLE,
                    }
                },
            },
            "responses": {
                "200": {
                    "description": "The Message, or (with `stream`) its server-sent events.",
                    "headers": _PROCESS_HEADERS,
                    "content": {
                        "application/json": {"schema": _MESSAGE},
                        "text/event-stream": {"schema": {"type": "string"}},
                    },
                },
                **_RUN_ERRORS,
            },
        }
    },
    "/v1/messages/pooled": {
        "post": {
            "summary": "Create a Message, streaming the CLI's own events",
            "description": "The same conversation engine; each server-sent event is one line of the CLI. The stream ends right after `result`, the process lives on.",
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/MessagesRequest"},
                        "example": _REQUEST_EXAMPLE,
                    }
                },
            },
            "responses": {
                "200": {
                    "description": "The CLI's events.",
                    "headers": _PROCESS_HEADERS,
                    "content": {"text/event-stream": {"schema": {"type": "string"}}},
                },
                **_RUN_ERRORS,
            },
        }
    },
    "/v1/messages/count_tokens": {
        "post": {
            "summary": "Count the tokens of a request",
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/MessagesRequest"},
                        "example": {k: v for k, v in _REQUEST_EXAMPLE.items() if k != "max_tokens"},
                    }
                },
            },
            "responses": {
                "200": {
                    "description": "The count.",
                    "content": {
                        "application/json": {
                            "schema": {"type": "object", "properties": {"input_tokens": {"type": "integer"}}},
                            "example": {"input_tokens": 12},
                        }
                    },
                },
                **_RUN_ERRORS,
            },
        }
    },
    "/v1/models": {
        "get": {
            "summary": "List models",
            "responses": {"200": {"description": "A page of models."}, **_errors(401, 403, 429, 500, 502, 503)},
        }
    },
    "/v1/models/{model}": {
        "get": {
            "summary": "Get a model",
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": {"200": {"description": "The model."}, **_errors(401, 403, 404, 429, 500, 502, 503)},
        }
    },
    "/v1/pool/stats": {
        "get": {
            "summary": "The pool, as far as the caller may see it",
            "responses": {
                "200": {"description": "Processes, limits, and the caller's own process."},
                **_errors(401, 403, 500),
            },
        }
    },
    "/v1/security": {
        "get": {
            "summary": "The sandbox and security level in force",
            "responses": {
                "200": {"description": "Mechanism by mechanism: present or missing, what is lost, how to get it."},
                **_errors(401, 403, 500),
            },
        }
    },
}

_SCHEMAS: Final[dict[str, Any]] = {
    "Error": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {
                    "type": {"type": "string"},
                    "message": {"type": "string"},
                    "code": {"type": "string", "description": "Stable code of this server."},
                    "param": {"type": ["string", "null"], "description": "The offending field."},
                    "details": {"type": "object"},
                },
            },
            "request_id": {"type": "string"},
        },
        "example": {"type": "error", "error": {"type": "invalid_request_error", "message": "messages: must not be empty", "code": "invalid_request", "param": "messages"}, "request_id": "req_01"},
    },
    "Message": {
        "type": "object",
        "required": ["id", "type", "role", "model", "content", "stop_reason", "usage"],
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": {"type": "string"},
            "content": {"type": "array", "items": {"type": "object"}},
            "stop_reason": {"type": ["string", "null"]},
            "stop_sequence": {"type": ["string", "null"]},
            "usage": {"type": "object"},
        },
    },
    "MessagesRequest": {
        "type": "object",
        "required": ["model", "messages"],
        "properties": {
            "model": {"type": "string"},
            "max_tokens": {"type": "integer", "minimum": 1},
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}},
                },
            },
            "system": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            "stream": {"type": "boolean", "default": False},
            "tools": {"type": "array", "items": {"type": "object"}, "description": "Tools that the caller runs itself."},
            "session_id": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$", "description": "Extension: names a conversation."},
            "agent": {
                "type": "object",
                "description": "Extension: agent behaviour, within the server's security level.",
                "properties": {
                    "tools": {"oneOf": [{"enum": ["none", "default"]}, {"type": "array", "items": {"type": "string"}}], "default": "none"},
                    "permission_mode": {"type": "string"},
                    "append_system_prompt": {"type": "string"},
                    "max_turns": {"type": "integer", "minimum": 1},
                    "on_disconnect": {"enum": ["interrupt", "continue"], "default": "interrupt"},
                },
            },
            "mcp_servers": {"description": "Extension of the beta API: MCP servers for this conversation, local or remote."},
        },
        "additionalProperties": True,
    },
}  # fmt: skip


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of this application; built once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            openapi_version="3.1.0",
        )
        document.setdefault("paths", {}).update({**_PATHS, **admin.paths()})
        document["paths"].update(describe_resources(_RUN_ERRORS))
        document["paths"].update(describe_sessions(_RUN_ERRORS))
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update({**admin.schemas(), **_SCHEMAS})
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
        app.openapi_schema = document
    return app.openapi_schema
