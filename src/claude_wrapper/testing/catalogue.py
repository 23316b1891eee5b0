"""The models of the scripted upstream, in the shape of the real ones."""

from __future__ import annotations

from claude_wrapper.wire.models import ModelInfo, full_capabilities

MODELS = tuple(
    ModelInfo(
        id=name,
        display_name=display,
        created_at=created,
        line=line,
        max_input_tokens=1_000_000,
        max_tokens=128_000,
        capabilities=full_capabilities(),
        aliases=(line, f"{name}[1m]"),
    )
    for name, display, created, line in (
        ("claude-opus-5-5", "Claude Opus 5.5", "2026-09-01T00:00:00Z", "opus"),
        ("claude-sonnet-5-5", "Claude Sonnet 5.5", "2026-08-01T00:00:00Z", "sonnet"),
        ("claude-haiku-4-5", "Claude Haiku 4.5", "2025-10-01T00:00:00Z", "haiku"),
    )
)
"""Newest first, as the API lists them."""
