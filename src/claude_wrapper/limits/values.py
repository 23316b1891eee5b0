"""What may be limited, for whom, and how an operator or an admin writes it down.

    {"requests": "100/hour", "input_tokens": 400000, "concurrent_turns": 4}

Rates are `N` (per minute), `N/second`, `N/minute`, `N/hour`, `N/day`, each with an optional ` burst B`, or a list of
them; counts are whole numbers; `"unlimited"` lifts what a default would set. The same in one line of configuration:
`requests=100/hour, concurrent_turns=4`.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits.gcra import Rate

UNLIMITED: Final = "unlimited"
PERIODS: Final[Mapping[str, float]] = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
LARGEST: Final = 10**12
"""Above this a limit is a typing error; below it, floating point keeps whole units apart."""
MOST_RATES: Final = 4
_RATE: Final = re.compile(r"\s*(\d{1,13})\s*(?:/\s*(second|minute|hour|day))?\s*(?:burst\s+(\d{1,13}))?\s*\Z")


class Scope(enum.StrEnum):
    """Whose limit it is. The order is the order of asking: the narrowest refuses first."""

    SESSION = "session"
    KEY = "key"
    USER = "user"
    WORKSPACE = "workspace"
    ORGANIZATION = "organization"


class Resource(enum.StrEnum):
    """What is limited."""

    REQUESTS = "requests"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    CONCURRENT_TURNS = "concurrent_turns"
    PROCESSES = "processes"
    SESSIONS = "sessions"


RATES: Final = (Resource.REQUESTS, Resource.INPUT_TOKENS, Resource.OUTPUT_TOKENS)
COUNTS: Final = (Resource.CONCURRENT_TURNS, Resource.PROCESSES, Resource.SESSIONS)


class Caller(Protocol):
    """What limits need to know of a `tenancy.Principal`."""

    @property
    def org(self) -> str: ...
    @property
    def workspace(self) -> str | None: ...
    @property
    def key_id(self) -> str | None: ...
    @property
    def user_id(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Subjects:
    """Everyone whose limits one request touches. `org` None is the operator, who has none."""

    org: str | None
    workspace: str | None = None
    key: str | None = None
    user: str | None = None
    session: str | None = None

    @classmethod
    def of(cls, principal: Caller, session: str | None = None) -> Subjects:
        return cls(principal.org, principal.workspace, principal.key_id, principal.user_id, session)

    def __iter__(self) -> Iterator[tuple[Scope, str]]:
        """Each scope with its id, narrowest first; scopes without one are left out."""
        named = (
            (Scope.SESSION, self.session),
            (Scope.KEY, self.key),
            (Scope.USER, self.user),
            (Scope.WORKSPACE, self.workspace),
            (Scope.ORGANIZATION, self.org),
        )
        return ((scope, ident) for scope, ident in named if ident)


Value = tuple[Rate, ...] | int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one key, user, workspace or organisation. An absent resource is not limited here; None lifts a default."""

    entries: Mapping[Resource, Value] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Mapping[str, Any] | str | None, *, where: str = "limits") -> Limits:
        """Read JSON (as text or as a mapping) or the one-line form. Raises InvalidRequest that names the field."""
        if value is None or value == "":
            return NO_LIMITS
        if isinstance(value, str):
            value = _from_text(value, where)
        if not isinstance(value, Mapping):
            raise InvalidRequest("expected an object", field=where)
        found: dict[Resource, Value] = {}
        for name, item in value.items():
            resource, unit = _resource(name, where)
            if item is not None:
                per = unit and isinstance(item, int) and not isinstance(item, bool)
                found[resource] = _value(resource, f"{item}/{unit}" if per else item, f"{where}.{name}")
        return cls(found)

    def over(self, default: Limits) -> Limits:
        """These limits where they say something, else `default`'s."""
        return Limits({**default.entries, **self.entries}) if default.entries else self

    def rates(self, resource: Resource) -> tuple[Rate, ...]:
        value = self.entries.get(resource)
        return value if isinstance(value, tuple) else ()

    def count(self, resource: Resource) -> int | None:
        value = self.entries.get(resource)
        return value if isinstance(value, int) else None

    def looser_than(self, ceiling: Limits) -> Resource | None:
        """The first resource of which these limits would let more pass than `ceiling` does; None if there is none."""
        for resource, bound in ceiling.entries.items():
            if bound is None or resource not in self.entries:
                continue  # what is not said here stays at the ceiling
            mine = self.entries[resource]
            if mine is None:
                return resource
            if isinstance(bound, int):
                if not isinstance(mine, int) or mine > bound:
                    return resource
            elif isinstance(mine, int) or not all(any(_within(own, rate) for own in mine) for rate in bound):
                return resource
        return None

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        return {resource.value: _written(value) for resource, value in self.entries.items()}


NO_LIMITS: Final = Limits()


def _within(own: Rate, rate: Rate) -> bool:
    return own.per_second <= rate.per_second and own.capacity <= rate.capacity


def describe(rate: Rate) -> str:
    """`100/hour`, as it is written in a limit."""
    unit = next((name for name, seconds in PERIODS.items() if seconds == rate.period), f"{rate.period:g} s")
    return f"{rate.limit}/{unit}" + ("" if rate.burst is None else f" burst {rate.burst}")


def _written(value: Value) -> Any:
    if value is None:
        return UNLIMITED
    if isinstance(value, int):
        return value
    texts = [describe(rate) for rate in value]
    return texts[0] if len(texts) == 1 else texts


def _from_text(text: str, where: str) -> Mapping[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise InvalidRequest(f"not JSON: {error}", field=where) from error
        return parsed if isinstance(parsed, dict) else {}
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign:
            raise InvalidRequest(f"{part!r} is not `name=value`, as in `requests=100/hour`", field=where)
        found[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return found


def _resource(name: str, where: str) -> tuple[Resource, str | None]:
    """The resource, and the period if the name carries it, as the Admin API's `requests_per_minute` does."""
    plain, per, unit = name.removesuffix("_cache_aware").partition("_per_")
    if plain in set(Resource) and (not per or (unit in PERIODS and Resource(plain) in RATES)):
        return Resource(plain), unit or None
    raise InvalidRequest(f"no such limit; there are {', '.join(Resource)}", field=f"{where}.{name}")


def _value(resource: Resource, item: Any, path: str) -> Value:
    if item == UNLIMITED:
        return None
    if resource in COUNTS:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= LARGEST:
            raise InvalidRequest("expected a whole number from 0, or `unlimited`", field=path)
        return item
    items = item if isinstance(item, list) else [item]
    if not 1 <= len(items) <= MOST_RATES:
        raise InvalidRequest(f"expected 1 to {MOST_RATES} rates", field=path)
    return tuple(_rate(one, path) for one in items)


def _rate(item: Any, path: str) -> Rate:
    matched = _RATE.match(str(item)) if isinstance(item, (int, str)) and not isinstance(item, bool) else None
    if matched is None:
        raise InvalidRequest("expected a rate like 50 (per minute) or `100/hour`, or `unlimited`", field=path)
    limit, unit, burst = matched.groups()
    rate = Rate(int(limit), PERIODS[unit or "minute"], int(burst) if burst else None)
    if not 1 <= rate.limit <= LARGEST or not 1 <= rate.capacity <= LARGEST:
        raise InvalidRequest(
            f"a rate and its burst are from 1 to {LARGEST}; to forbid all, take the scope away", field=path
        )
    return rate
