"""Prices by date and prefix, and the arithmetic of a call's cost."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import ConfigurationError, InvalidRequest, PermissionDenied
from claude_wrapper.ids import RandomIds
from claude_wrapper.storage import Database
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import operator, user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.usage import Dated, Price, PriceBook, from_file, packaged, prices
from claude_wrapper.usage.cost import micros
from claude_wrapper.usage.prices import load
from claude_wrapper.wire.usage import Usage

NOW = datetime(2026, 11, 20, tzinfo=UTC)
COUNTS = st.integers(0, 10**7)
USAGES = st.builds(Usage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.integers(0, 50), st.integers(0, 50))
AMOUNTS = st.integers(0, 10**9)
PRICES = st.builds(Price, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, st.integers(0, 10**5))


@given(PRICES, USAGES)
def test_a_cost_is_the_exact_sum_rounded_once_half_up(price: Price, usage: Usage) -> None:
    exact = Fraction(
        usage.input_tokens * price.input
        + usage.output_tokens * price.output
        + usage.cache_read_tokens * price.cache_read
        + usage.cache_write_5m_tokens * price.cache_write_5m
        + usage.cache_write_1h_tokens * price.cache_write_1h,
        10**6,
    )
    cost = micros(price, usage) - usage.web_search_requests * price.web_search
    assert isinstance(cost, int)
    assert -Fraction(1, 2) < cost - exact <= Fraction(1, 2)


def test_a_known_call_costs_what_the_list_says() -> None:
    price = packaged().find("claude-sonnet-5-5", NOW)
    assert price is not None
    used = Usage(
        input_tokens=1_000_000,
        output_tokens=1_000_000,
        cache_read_tokens=1_000_000,
        cache_write_5m_tokens=1_000_000,
        cache_write_1h_tokens=1_000_000,
        thinking_tokens=500_000,
        web_search_requests=3,
    )
    assert micros(price, used) == 2_000_000 + 10_000_000 + 100_000 + 2_500_000 + 4_000_000 + 30_000


def test_a_price_holds_from_its_date_on() -> None:
    table = packaged()
    change = datetime(2026, 10, 7, tzinfo=UTC)
    before, after = (
        table.find("claude-sonnet-5-5", change - timedelta(seconds=1)),
        table.find("claude-sonnet-5-5", change),
    )
    assert before is not None
    assert after is not None
    assert (before.cache_read, after.cache_read) == (200_000, 100_000)


def test_a_long_prompt_has_its_own_prices() -> None:
    price = packaged().find("claude-haiku-5-5", NOW)
    assert price is not None
    assert micros(price, Usage(input_tokens=50_000, cache_read_tokens=50_000, output_tokens=1000)) == 5000 + 500 + 500
    assert (
        micros(price, Usage(input_tokens=50_001, cache_read_tokens=50_000, output_tokens=1000)) == 25_001 + 2500 + 2500
    )


@pytest.mark.parametrize(
    ("model", "input_price"),
    [
        ("claude-opus-4-1-20250805", 15_000_000),
        ("claude-opus-4-5-20251101", 5_000_000),
        ("claude-opus-5", 5_000_000),
        ("claude-opus-5-5", 4_000_000),
        ("claude-opus-5-20260101", 5_000_000),
        ("us.anthropic.claude-haiku-4-5-20251001-v1:0", 1_000_000),
        ("claude-haiku-4-5@20251001", 1_000_000),
        ("claude-sonnet-5-5[1m]", 2_000_000),
        ("claude-opus-55", 15_000_000),
        ("gpt-7", 15_000_000),
        ("", 15_000_000),
    ],
)
def test_the_longest_prefix_wins_and_strangers_are_dear(model: str, input_price: int) -> None:
    price = packaged().find(model, NOW)
    assert price is not None
    assert price.input == input_price


def test_a_call_before_a_models_first_date_takes_its_first_price() -> None:
    price = packaged().find("claude-sonnet-5-5", datetime(2020, 1, 1, tzinfo=UTC))
    assert price is not None
    assert price.cache_read == 200_000


@given(PRICES, PRICES, st.integers(0, 10**6))
def test_a_price_that_is_written_is_read_back(price: Price, longer: Price, threshold: int) -> None:
    whole = Price(**{**price.to_json(), "over": longer, "over_prompt_tokens": threshold})
    assert Price.parse(json.loads(json.dumps(whole.to_json()))) == whole


def test_names_that_callers_invent_do_not_fill_the_memory() -> None:
    table = packaged()
    for n in range(5000):
        table.find(f"made-up-{n}", NOW)
    assert len(table._known) <= 2000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense", "JSONDecodeError"),
        ('{"version": "1", "prices": []}', "no entry for `\\*`"),
        (
            '{"version": "1", "prices": [{"model": "*", "from": "2026-01-01T00:00:00Z", "input": 1.5}]}',
            r"prices\[0\].input",
        ),
        (
            '{"version": "1", "prices": [{"model": "*", "from": "2026-01-01T00:00:00", "input": 1}]}',
            "no time zone|cache_read",
        ),
        ('{"prices": 5}', "TypeError"),
    ],
)
def test_a_price_file_that_cannot_be_used_says_why(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        load(text)
    with pytest.raises(ConfigurationError, match="No such file"):
        from_file(tmp_path / "absent.json")


@pytest.mark.anyio
async def test_an_organisations_own_prices_come_first_and_the_row_tells_by_which(database: Database) -> None:
    clock = ManualClock()
    acting = operator().acting_in("org_1")
    book = PriceBook(packaged(), database, clock)
    used = Usage(input_tokens=1_000_000)
    listed = await book.priced("org_1", "claude-sonnet-5-5", used, NOW)
    assert (listed.micros, listed.version) == (2_000_000, "2026-11-20")
    own = Dated("claude-sonnet-5", datetime(2026, 2, 1, tzinfo=UTC), Price(1, 1, 1, 1, 1))
    async with database.transaction() as tx:
        await prices.set_own(tx, acting, Scribe(clock, RandomIds()), own)
        await prices.set_own(tx, acting, Scribe(clock, RandomIds()), own)
        assert await prices.list_own(tx, acting) == (own,)
        assert await prices.list_own(tx, operator().acting_in("org_2")) == ()
        with pytest.raises(PermissionDenied):
            await prices.set_own(tx, user_principal("org_1", "u", Role.OWNER), Scribe(clock, RandomIds()), own)
    assert (await book.micros("org_1", "claude-sonnet-5-5", used, NOW)) == 2_000_000, "kept in memory for a minute"
    book.forget("org_1")
    priced = await book.priced("org_1", "claude-sonnet-5-5", used, NOW)
    assert (priced.micros, priced.version) == (1, "org_1@2026-01-01T00:00:00Z")
    assert await book.micros("org_1", "claude-opus-5-5", used, NOW) == 4_000_000
    assert await book.micros("org_2", "claude-sonnet-5-5", used, NOW) == 2_000_000
    await database.close()
    await clock.advance(61)
    assert await book.micros("org_1", "claude-sonnet-5-5", used, NOW) == 1, (
        "a call is priced while the database is away"
    )


@pytest.mark.anyio
async def test_an_own_price_can_be_taken_back(database: Database) -> None:
    acting = operator().acting_in("org_1")
    own = Dated("claude", datetime(2026, 2, 1, tzinfo=UTC), Price(1, 1, 1, 1, 1))
    scribe = Scribe(ManualClock(), RandomIds())
    async with database.transaction() as tx:
        await prices.set_own(tx, acting, scribe, own)
        assert await prices.remove_own(tx, acting, scribe, "claude", own.effective_from)
        assert not await prices.remove_own(tx, acting, scribe, "claude", own.effective_from)
        assert await prices.list_own(tx, acting) == ()
        with pytest.raises(InvalidRequest):
            await prices.set_own(tx, acting, scribe, Dated("", NOW, own.price))


def test_the_packaged_file_tells_operators_to_review_it() -> None:
    path = Path(prices.__file__).with_name("prices.json")
    document: dict[str, Any] = json.loads(path.read_text())
    assert "must compare" in document["review"]
    assert from_file(path).version == document["version"]
