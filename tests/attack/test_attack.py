"""The attack suite judges rightly, and the strongest level of this host keeps its promises (a sample; `make attack` runs all)."""

from __future__ import annotations

import dataclasses

import pytest

from claude_wrapper.sandbox import Level, probe
from claude_wrapper.testing.attack.catalogue import ATTACKS, Attack
from claude_wrapper.testing.attack.catalogue_broker import BROKER_ATTACKS
from claude_wrapper.testing.attack.real import run_column_with_cli
from claude_wrapper.testing.attack.runner import Outcome, broken, columns, promised, run_column, table

SAMPLE = {
    "read another tenant's files",
    "read the environment and memory of others",
    "reach a service on the host's loopback",
    "make or enter namespaces",
    "write kernel settings",
    "lead the server astray by links",
}


def test_a_promise_holds_where_all_facts_of_one_condition_are_there() -> None:
    attack = Attack("a", "", ("bwrap+uid", "restricted"))

    assert promised(attack, frozenset({"bwrap", "uid"}))
    assert promised(attack, frozenset({"restricted"}))
    assert not promised(attack, frozenset({"bwrap"}))
    assert not promised(attack, frozenset({"none"}))


def test_every_breach_that_a_real_sandbox_declares_is_explained() -> None:
    for attack in (*ATTACKS, *BROKER_ATTACKS):
        assert {"bwrap", "restricted"} <= set(attack.holds) or attack.why_not, attack.name


def test_names_of_attacks_are_unique() -> None:
    assert len({attack.name for attack in (*ATTACKS, *BROKER_ATTACKS)}) == len(ATTACKS) + len(BROKER_ATTACKS)


def test_a_broken_promise_and_an_attack_that_could_not_be_made_are_failures() -> None:
    held = Outcome("a", "bwrap", held=True, promised=True, detail="")
    declared = dataclasses.replace(held, held=False, promised=False)
    breach = dataclasses.replace(held, held=False)
    failed = dataclasses.replace(declared, failed=True)

    assert broken([held, declared, breach, failed]) == [breach, failed]
    assert [table([one], (Attack("a", ""),)).splitlines()[-1] for one in (held, declared, breach, failed)] == [
        "| a | H |",
        "| a | B |",
        "| a | **B!** |",
        "| a | ? |",
    ]


@pytest.mark.process
@pytest.mark.anyio
async def test_without_a_sandbox_the_attacks_succeed_so_they_can_tell_a_wall_from_none() -> None:
    column = next(found for found in columns(probe()) if found.label == Level.NONE)
    attacks = tuple(attack for attack in ATTACKS if attack.name in SAMPLE and "none" not in attack.holds)
    outcomes = await run_column(column, tuple(a for a in attacks if a.name != "write kernel settings"))

    assert [outcome.attack for outcome in outcomes if outcome.held or outcome.failed] == []


@pytest.mark.process
@pytest.mark.anyio
async def test_the_strongest_level_of_this_host_keeps_its_promises() -> None:
    column = next(iter(columns(probe())))
    if column.label == Level.NONE:
        pytest.skip("this host can enforce no sandbox")
    outcomes = await run_column(column, tuple(attack for attack in ATTACKS if attack.name in SAMPLE))

    assert len(outcomes) == len(SAMPLE)
    assert broken(outcomes) == []


@pytest.mark.real_cli
@pytest.mark.anyio
async def test_through_the_agents_own_bash_the_strongest_level_keeps_its_promises() -> None:
    column = next(iter(columns(probe())))
    if column.label == Level.NONE:
        pytest.skip("this host can enforce no sandbox")
    names = {
        "read another tenant's files",
        "broker: work under another slot's token",
        "broker: split requests",
        "broker: ask for another model than the turn's",
    }
    attacks = tuple(attack for attack in (*ATTACKS, *BROKER_ATTACKS) if attack.name in names)
    outcomes, _ = await run_column_with_cli(column, attacks)

    assert len(outcomes) == len(names)
    assert broken(outcomes) == []
