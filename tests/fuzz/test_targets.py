"""Parsers of what strangers write: nothing but their declared errors, whatever comes and however it is cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claude_wrapper.testing.fuzz import TARGETS, main, mutated

names = pytest.mark.parametrize("name", sorted(TARGETS))


@names
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


@names
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_damaged_real_input(name: str, seed: int) -> None:
    target = TARGETS[name]
    target.run(mutated(target.seeds, random.Random(seed)))


@names
def test_undamaged_input_passes(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


def test_the_command_lists_its_targets_and_runs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["sse", "--seconds", "0.1"]) == 0
    assert "nothing found" in capsys.readouterr().out
