"""Items and lists of `GET /v1/models`, in one shape that the Anthropic and the OpenAI SDKs both read (wire-api 1.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model. `created_at` is RFC 3339; the token limits are what the model takes and gives at most."""

    id: str
    display_name: str
    created_at: str
    line: str | None = None
    lifecycle: str = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None
    capabilities: Mapping[str, Any] | None = None
    aliases: tuple[str, ...] = ()


def full_capabilities() -> dict[str, Any]:
    """The `capabilities` object of a model that can do everything the API knows."""
    yes: dict[str, Any] = {"supported": True}
    return {
        "batch": yes,
        "citations": yes,
        "code_execution": yes,
        "image_input": yes,
        "pdf_input": yes,
        "structured_outputs": yes,
        "context_management": {
            **yes,
            "clear_tool_uses_20250919": yes,
            "clear_thinking_20251015": yes,
            "compact_20260112": yes,
        },
        "effort": {**yes, "low": yes, "medium": yes, "high": yes, "xhigh": yes, "max": yes},
        "thinking": {
            **yes,
            "types": {"adaptive": yes, "between_tools": yes, "disabled": yes, "enabled": yes},
        },
        "server_tools": {**yes, "web_search": yes, "code_execution": yes},
    }


def model_to_wire(model: ModelInfo, *, owned_by: str = "anthropic") -> dict[str, Any]:
    """One item. `object`, `created` and `owned_by` are for OpenAI clients; Anthropic clients ignore them."""
    item: dict[str, Any] = {
        "type": "model",
        "id": model.id,
        "display_name": model.display_name,
        "created_at": model.created_at,
        "lifecycle": model.lifecycle,
        "object": "model",
        "created": int(datetime.fromisoformat(model.created_at).timestamp()),
        "owned_by": owned_by,
    }
    for name in ("line", "max_input_tokens", "max_tokens", "capabilities"):
        if (value := getattr(model, name)) is not None:
            item[name] = value
    return item


def find_model(models: Iterable[ModelInfo], name: str) -> ModelInfo | None:
    """The model with this id or alias."""
    return next((model for model in models if name == model.id or name in model.aliases), None)


def list_to_wire(
    models: Sequence[ModelInfo], *, limit: int = 20, after_id: str | None = None, before_id: str | None = None
) -> dict[str, Any]:
    """One page in the given order ("id page", wire-api 0.8). An unknown cursor gives an empty page."""
    page = list(models)
    ids = [model.id for model in page]
    if before_id is not None:
        page = page[: ids.index(before_id)] if before_id in ids else []
        more = len(page) > limit
        page = page[-limit:]
    else:
        if after_id is not None:
            page = page[ids.index(after_id) + 1 :] if after_id in ids else []
        more = len(page) > limit
        page = page[:limit]
    return {
        "data": [model_to_wire(model) for model in page],
        "has_more": more,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "object": "list",
    }
