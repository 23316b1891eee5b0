"""What a call costs, in whole micro-dollars (1 dollar = 1 000 000). Pure.

Rounding: the products of tokens and prices of one call are added exactly, and the sum is rounded once, half up. So a
call is off by at most half a micro-dollar, and a report's sum is exactly the sum of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.wire.usage import Usage

PER: Final = 1_000_000
MOST: Final = 10**12
"""A million dollars per million tokens: more is a typing error."""


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-dollars per million tokens of each kind; `web_search` in micro-dollars per search."""

    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    web_search: int = 0
    over_prompt_tokens: int | None = None
    over: Price | None = None
    """Replaces all prices of a call whose prompt is longer than `over_prompt_tokens`."""

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, where: str = "price") -> Price:
        """From JSON as in `prices.json`; raises InvalidRequest that names the field."""
        numbers: dict[str, Any] = {}
        for field in fields(cls):
            if field.name.startswith("over"):
                continue
            number = value.get(field.name, 0 if field.name == "web_search" else None)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MOST:
                raise InvalidRequest("expected whole micro-dollars from 0", field=f"{where}.{field.name}")
            numbers[field.name] = number
        over = value.get("over")
        if over is None:
            return cls(**numbers)
        threshold = over.get("prompt_tokens") if isinstance(over, Mapping) else None
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise InvalidRequest("expected a whole number of tokens", field=f"{where}.over.prompt_tokens")
        longer = {key: item for key, item in over.items() if key != "over"}
        return cls(**numbers, over_prompt_tokens=threshold, over=cls.parse(longer, where=f"{where}.over"))

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        found: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(self) if not field.name.startswith("over")
        }
        if self.over is not None:
            found["over"] = {"prompt_tokens": self.over_prompt_tokens, **self.over.to_json()}
        return found


def micros(price: Price, usage: Usage) -> int:
    """The cost of one call. Thinking tokens are part of the output and are not added; web fetches cost nothing."""
    if (
        price.over is not None
        and price.over_prompt_tokens is not None
        and usage.prompt_tokens > price.over_prompt_tokens
    ):
        price = price.over
    total = (
        usage.input_tokens * price.input
        + usage.output_tokens * price.output
        + usage.cache_read_tokens * price.cache_read
        + usage.cache_write_5m_tokens * price.cache_write_5m
        + usage.cache_write_1h_tokens * price.cache_write_1h
    )
    return (total + PER // 2) // PER + usage.web_search_requests * price.web_search
