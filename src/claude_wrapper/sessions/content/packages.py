"""Packages of an environment, installed by the package managers of the sandbox, for its user, through its own way out."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

INSTALL_SECONDS: Final = 300.0
_LOCAL: Final = '"$HOME/.local"'
_COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "pip": ("pip", "python3 -m pip install --user --no-input --quiet --disable-pip-version-check -- {packages}"),
    "npm": ("npm", f"npm install --global --prefix {_LOCAL} --no-audit --no-fund --loglevel=error -- {{packages}}"),
    "cargo": ("cargo", f"cargo install --quiet --root {_LOCAL} -- {{packages}}"),
    "gem": ("gem", f"gem install --user-install --no-document --bindir {_LOCAL}/bin {{packages}}"),
    "go": ("go", f"for one in {{packages}}; do GOBIN={_LOCAL}/bin go install $one || exit 1; done"),
}
"""By manager: the program that must be there, and what it is told. Names were checked: none begins with a hyphen."""
ENVIRONMENT: Final[Mapping[str, str]] = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_CACHE_DIR": "1"}
_MISSING: Final = 97


@dataclass(frozen=True, slots=True)
class Step:
    """One manager's packages."""

    manager: str
    script: str


def wanted(environment: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Packages by manager, without the managers that have none."""
    packages = (environment or {}).get("packages") or {}
    return {name: list(some) for name, some in packages.items() if isinstance(some, list) and some}


def stamp(packages: Mapping[str, Sequence[str]]) -> str:
    """What is noted once they are installed."""
    return hashlib.sha256(json.dumps(packages, sort_keys=True).encode()).hexdigest() if packages else ""


def steps(packages: Mapping[str, Sequence[str]]) -> tuple[list[Step], list[str]]:
    """What to run, and what cannot be done at all."""
    done: list[Step] = []
    refused: list[str] = []
    for manager, names in packages.items():
        if manager not in _COMMANDS:
            refused.append(
                f"{manager} packages ({', '.join(names)}) need the system's root and cannot be installed in a sandbox: "
                "the operator of this server can install them on its host, where every sandbox sees them"
            )
            continue
        program, command = _COMMANDS[manager]
        line = command.format(packages=" ".join(shlex.quote(name) for name in names))
        prepare = 'mkdir -p "$HOME/.local/bin" "$HOME/.tmp"; export TMPDIR="$HOME/.tmp"'
        script = f"command -v {program} >/dev/null || exit {_MISSING}; {prepare}; {line}; status=$?; "
        done.append(Step(manager, f'{script}rm -rf "$HOME/.tmp"; exit $status'))
    return done, refused


def failure(step: Step, status: int, said: str) -> str:
    """What to tell of a step that did not end with 0."""
    if status == _MISSING:
        return (
            f"{step.manager} is not in the sandbox: its packages were not installed. The operator of this server can "
            "install it on its host"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{step.manager} could not install the packages (exit status {status}): {' | '.join(lines[-4:])[:1000]}"
