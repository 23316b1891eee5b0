"""Settings that cannot work are refused by name, and every field is documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest

from claude_wrapper.errors import ConfigurationError
from claude_wrapper.pool import settings as module
from claude_wrapper.pool.settings import PoolSettings
from pool.profiles import CHAT


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_processes": 0},
        {"parallel_spawns": 0},
        {"spawn_attempts": 0},
        {"max_processes_per_org": 0},
        {"max_processes_per_principal": 0},
        {"max_turns": 0},
        {"queue_seconds": -1.0},
        {"queue_length": -1},
        {"refill_delay_seconds": -0.1},
        {"idle_seconds": 0.0},
        {"sweep_seconds": 0.0},
        {"spawn_seconds": 0.0},
        {"stop_seconds": 0.0},
        {"spares": {CHAT: -1}},
        {"spares": {CHAT: 3}, "max_processes": 2},
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        PoolSettings(**wrong)


def test_every_field_says_what_it_means() -> None:
    tree = ast.parse(inspect.getsource(module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PoolSettings").body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(PoolSettings)}
