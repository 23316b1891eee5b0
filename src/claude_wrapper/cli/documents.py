"""Writes the documents that are generated from tables in the code: `make docs`. A test compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import click

from claude_wrapper import config
from claude_wrapper.pool import slot
from claude_wrapper.sandbox import security
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.tenancy import scopes
from claude_wrapper.testing.script import directives_markdown


def _pool_states() -> str:
    return (
        "# The states of a slot\n\n"
        "A slot is a place for one Claude process, from the decision to start it until nothing of it is left. The diagram is\n"
        "rendered from the table in `claude_wrapper.pool.slot`; a test compares the two.\n\n"
        f"```mermaid\n{slot.render_mermaid()}\n```\n"
    )


def _scripted_upstream() -> str:
    return (
        "# The scripted upstream\n\n"
        "`claude_wrapper.testing.upstream` is a small Messages API for tests and demonstrations, driven by directives in the\n"
        "prompt. Run it with `python -m claude_wrapper.testing.upstream PORT`.\n\n" + directives_markdown()
    )


DOCUMENTS: Final[Mapping[str, Callable[[], str]]] = {
    "settings.md": config.documentation,
    "security-levels.md": security.markdown,
    "metrics.md": lambda: Metrics().documentation(),
    "scopes.md": scopes.render_markdown,
    "pool-states.md": _pool_states,
    "scripted-upstream.md": _scripted_upstream,
}


def write(directory: Path) -> list[Path]:
    """Write every document; returns the ones that changed."""
    changed = []
    for name, render in DOCUMENTS.items():
        path = directory / name
        content = render()
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write(Path("docs")):
        click.echo(f"wrote {path}")
