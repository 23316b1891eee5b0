"""The command line: `claude-wrapper serve | demo | doctor | …`. Imports lazily, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from claude_wrapper import __version__
from claude_wrapper.cli.admin import admin, migrate
from claude_wrapper.errors import WrapperError


class _Commands(click.Group):
    """Domain errors end a command with one clear line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrapperError as error:
            click.secho(f"error: {error.message}", fg="red", err=True)
            sys.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="claude-wrapper")
def main() -> None:
    """The unmodified Claude CLI as a service: a warm process behind every conversation."""


_config = click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file with settings."
)


@main.command()
@_config
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where everything is kept.")
def serve(config: Path | None, host: str | None, port: int | None, data_dir: Path | None) -> None:
    """Start the server."""
    from claude_wrapper import config as settings
    from claude_wrapper.cli.serve import run

    def load() -> settings.Settings:
        return settings.load(os.environ, file=config, host=host, port=port, data_dir=data_dir)

    sys.exit(run(load(), reload=load))


@main.command()
@click.option("--keep", is_flag=True, help="Keep the data directory of the demonstration.")
def demo(keep: bool) -> None:
    """Start a server on a free port, hold a conversation with it, and show what was measured."""
    from claude_wrapper.cli.demo import run

    sys.exit(run(os.environ, keep=keep))


@main.command()
@_config
def doctor(config: Path | None) -> None:
    """Say what this host has and lacks, one line each, with the fix."""
    from claude_wrapper import config as settings
    from claude_wrapper.cli.doctor import run

    sys.exit(run(settings.load(os.environ, file=config)))


main.add_command(admin)
main.add_command(migrate)
