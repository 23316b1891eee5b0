"""The expressions of the dashboard and the alert rules, taken apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
WORDS = {"by", "le", "and", "or", "unless", "on", "without", "ignoring", "bool", "offset", "group_left"}
BY_PROMETHEUS = {"up"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    shown = [
        (f"panel {panel['title']}", target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    return [*shown, *((f"alert {rule['alert']}", rule["expr"]) for rule in rules())]


def series_of(expression: str) -> list[tuple[str, str]]:
    """(series name, the text between its braces) of each selector."""
    bare = re.sub(r"\b(?:by|on|ignoring|without)\s*\([^)]*\)", " ", expression)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    found = re.findall(r"([a-z_][a-z0-9_]*)\s*(\(|\{[^}]*\})?", bare.replace("$__rate_interval", ""))
    return [(name, after) for name, after in found if after != "(" and name not in WORDS]
