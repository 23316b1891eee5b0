"""Prices: a versioned data file with effective dates, and what single organisations agreed on instead."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import ConfigurationError, InvalidRequest, StorageUnavailable
from claude_wrapper.storage import Database, announce, dialects
from claude_wrapper.storage.tables.usage import usage_prices
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, require_operator
from claude_wrapper.usage.cost import Price, micros
from claude_wrapper.usage.entries import Priced
from claude_wrapper.wire.usage import Usage

CHANNEL: Final = "prices.changed"
"""Announced with the organisation's id (UTF-8) when its prices changed."""
ANY: Final = "*"
_ENDS: Final = ("-", "@", ":", "[", "/")
_MOST_MODELS: Final = 2000
_MOST_ORGS: Final = 10_000
_KEPT_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Dated:
    """A price of models that begin with `model`, from a moment on."""

    model: str
    effective_from: datetime
    price: Price


class PriceTable:
    """Looks prices up: the longest prefix, then the latest date. Immutable but for a memory of names."""

    def __init__(self, version: str, prices: Iterable[Dated]) -> None:
        self.version = version
        self._prices = sorted(prices, key=lambda dated: (len(dated.model), dated.effective_from), reverse=True)
        self._known: dict[str, tuple[Dated, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._prices)

    @property
    def models(self) -> tuple[str, ...]:
        """The names (or beginnings of names) that are listed, `*` left out."""
        return tuple(sorted({dated.model for dated in self._prices} - {ANY}))

    def find(self, model: str, at: datetime) -> Price | None:
        """The price of `model` for a call that began at `at`; None if neither it nor `*` is listed.

        A call before the first date of its model takes the first: a price that is known beats one that is guessed.
        """
        candidates = self._candidates(model)
        best = next((dated for dated in candidates if dated.effective_from <= at), None)
        if best is None and candidates:
            longest = candidates[0].model
            best = [dated for dated in candidates if dated.model == longest][-1]
        return None if best is None else best.price

    def _candidates(self, model: str) -> tuple[Dated, ...]:
        found = self._known.get(model)
        if found is None:
            # Clouds put a region and a vendor in front: `us.anthropic.claude-…`.
            plain = model[model.index("claude") :] if "claude" in model else model
            found = tuple(dated for dated in self._prices if _fits(dated.model, plain))
            if found and found[0].model != ANY:
                found = tuple(dated for dated in found if dated.model != ANY)
            if len(self._known) >= _MOST_MODELS:  # names come from callers
                self._known.clear()
            self._known[model] = found
        return found


def _fits(prefix: str, model: str) -> bool:
    if prefix in {ANY, model}:
        return True
    return model.startswith(prefix) and model[len(prefix)] in _ENDS


def load(text: str) -> PriceTable:
    """A price file (see the packaged `prices.json`); raises ConfigurationError that names the entry."""
    try:
        document = json.loads(text)
        entries: Sequence[Mapping[str, Any]] = document["prices"]
        prices = [
            Dated(entry["model"], _moment(entry["from"]), Price.parse(entry, where=f"prices[{index}]"))
            for index, entry in enumerate(entries)
        ]
        version = str(document["version"])
    except InvalidRequest as error:
        raise ConfigurationError(f"the price file: {error.message}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"the price file cannot be read: {type(error).__name__}: {error}") from error
    if not any(dated.model == ANY for dated in prices):
        raise ConfigurationError("the price file has no entry for `*`, which prices models that it does not list")
    return PriceTable(version, prices)


def packaged() -> PriceTable:
    """The prices that come with this version of the server."""
    return load(resources.files("claude_wrapper.usage").joinpath("prices.json").read_text())


def from_file(path: Path) -> PriceTable:
    """The operator's own price file."""
    try:
        return load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the price file {path} cannot be read: {error.strerror}") from error


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment


class PriceBook:
    """Prices of every organisation: its own where it has some, else the list's."""

    def __init__(self, table: PriceTable, database: Database | None, clock: Clock) -> None:
        self._table = table
        self._database = database
        self._clock = clock
        self._own: OrderedDict[str, tuple[PriceTable, float]] = OrderedDict()

    @property
    def models(self) -> tuple[str, ...]:
        """The names (or beginnings of names) in the list, organisations' own left out."""
        return self._table.models

    def listed(self, model: str, usage: Usage, at: datetime) -> int:
        """The cost at list prices, whatever an organisation agreed on, in micro-dollars; 0 for an unknown model."""
        price = self._table.find(model, at)
        return micros(price, usage) if price else 0

    async def micros(self, org: str, model: str, usage: Usage, at: datetime) -> int:
        """The cost in micro-dollars. Never raises for an unknown model."""
        return (await self.priced(org, model, usage, at)).micros

    async def priced(self, org: str, model: str, usage: Usage, at: datetime) -> Priced:
        """The cost, and the version of the prices that it was computed with."""
        own = await self._prices_of(org)
        price = own.find(model, at) if own else None
        if price is not None:
            return Priced(micros(price, usage), own.version)
        listed = self._table.find(model, at)
        return Priced(micros(listed, usage) if listed else 0, self._table.version)

    def forget(self, org: str) -> None:
        """Read the organisation's prices again at the next call."""
        kept = self._own.get(org)
        if kept is not None:
            self._own[org] = (kept[0], float("-inf"))

    async def _prices_of(self, org: str) -> PriceTable:
        kept = self._own.get(org)
        if kept is not None and kept[1] > self._clock.monotonic():
            return kept[0]
        table = await self._read(org, kept[0] if kept else _NONE)
        self._own[org] = (table, self._clock.monotonic() + _KEPT_SECONDS)
        self._own.move_to_end(org)
        while len(self._own) > _MOST_ORGS:
            self._own.popitem(last=False)
        return table

    # tenant-scope: the prices of the organisation whose call is priced
    async def _read(self, org: str, known: PriceTable) -> PriceTable:
        if self._database is None or not org:
            return _NONE
        try:
            async with self._database.read() as tx:
                rows = (await tx.execute(sa.select(usage_prices).where(usage_prices.c.org_id == org))).mappings().all()
        except StorageUnavailable:
            return known  # a call must be priced while the database is away; the version in its row tells by what
        if not rows:
            return _NONE
        newest = max(row["created_at"] for row in rows)
        dated = [Dated(row["model"], row["effective_from"], Price.parse(row["price"])) for row in rows]
        return PriceTable(f"{org}@{newest:%Y-%m-%dT%H:%M:%SZ}", dated)


_NONE: Final = PriceTable("none", ())


async def list_own(tx: AsyncConnection, principal: Principal) -> tuple[Dated, ...]:
    """The prices that the organisation has of its own."""
    principal.require("read:costs")
    order = (usage_prices.c.model, usage_prices.c.effective_from)
    rows = await tx.execute(sa.select(usage_prices).where(usage_prices.c.org_id == principal.org).order_by(*order))
    return tuple(Dated(row["model"], row["effective_from"], Price.parse(row["price"])) for row in rows.mappings())


async def set_own(tx: AsyncConnection, principal: Principal, scribe: Scribe, dated: Dated) -> None:
    """Set an organisation's own price from a moment on: the operator's to do. Calls already recorded keep their cost."""
    require_operator(principal)
    if not dated.model or len(dated.model) > 200:
        raise InvalidRequest("expected a model's name or the beginning of one, at most 200 characters", field="model")
    unique = ("org_id", "model", "effective_from")
    changes = {"price": lambda new: new.price, "created_at": lambda new: new.created_at}
    statement = dialects.upsert(tx.dialect.name, usage_prices, unique, changes)
    await tx.execute(
        statement.values(
            org_id=principal.org,
            model=dated.model,
            effective_from=dated.effective_from,
            price=dated.price.to_json(),
            created_at=scribe.now(),
        )
    )
    await scribe.record(tx, principal, "price.set", ("price", dated.model), after=_audited(dated))
    announce(tx, CHANNEL, principal.org.encode())


async def remove_own(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, model: str, effective_from: datetime
) -> bool:
    """Remove an own price; whether there was one."""
    require_operator(principal)
    same = (
        usage_prices.c.org_id == principal.org,
        usage_prices.c.model == model,
        usage_prices.c.effective_from == effective_from,
    )
    removed = await tx.execute(sa.delete(usage_prices).where(*same))
    if not removed.rowcount:
        return False
    since = {"effective_from": effective_from.isoformat()}
    await scribe.record(tx, principal, "price.remove", ("price", model), before=since)
    announce(tx, CHANNEL, principal.org.encode())
    return True


def _audited(dated: Dated) -> dict[str, Any]:
    return {"effective_from": dated.effective_from.isoformat(), **dated.price.to_json()}
