"""`claude-wrapper doctor`: what this host has and lacks, one line each, with the fix."""

from __future__ import annotations

import subprocess

import click

from claude_wrapper.agent.launch import locate_cli
from claude_wrapper.config import Settings
from claude_wrapper.errors import WrapperError
from claude_wrapper.sandbox.choose import choose_level
from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sandbox.security import SecurityLevel, effective_policy

_CLI_SECONDS = 30


def run(settings: Settings) -> int:
    """Print the report; returns 0 if a server with these settings could start."""
    report = probe()
    click.echo(report.text())
    good = _cli(settings)
    try:
        required = Level(settings.sandbox_require) if settings.sandbox_require else None
        level = choose_level(settings.sandbox, required, report)
    except WrapperError as error:
        click.secho(f"MISSING {error.message}", fg="red")
        return 1
    policy = effective_policy(SecurityLevel(settings.security_level), level)
    click.echo(f"ok      security level {policy.level} in sandbox {level}: {len(policy.tools)} built-in tools allowed")
    for loss in policy.lowered:
        click.secho(f"        lowered: {loss}", fg="yellow")
    return 0 if good else 1


def _cli(settings: Settings) -> bool:
    try:
        path = locate_cli(str(settings.cli) if settings.cli else None)
        answer = subprocess.run([path, "--version"], env={}, capture_output=True, timeout=_CLI_SECONDS, check=True)
    except (WrapperError, OSError, subprocess.SubprocessError) as error:
        click.secho(f"MISSING Claude CLI: {error}", fg="red")
        return False
    click.echo(f"ok      Claude CLI: {answer.stdout.decode().strip()} ({path})")
    return True
