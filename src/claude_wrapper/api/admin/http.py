"""What every admin route does: who asks and for which organisation, bodies, queries, pages, idempotent creates.

A route is a row of a table: method, path, the scope that it needs, and a handler that takes an `Asked`. The row is what
enforces the scope (the store functions check again), what the OpenAPI document shows, and what the isolation test reads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.bodies import read_body
from claude_wrapper.api.state import Deps, deps_of
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.pagination import DEFAULT_LIMIT, Page, PageRequest
from claude_wrapper.tenancy import idempotency
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.idempotency import StoredAnswer
from claude_wrapper.tenancy.orgs import get_organization
from claude_wrapper.tenancy.principal import ActorKind, Principal, require_operator
from claude_wrapper.tenancy.scopes import Role

T = TypeVar("T")

ORGANIZATION_HEADER: Final = "cw-organization"
"""The operator names the organisation to act in; anybody else may only name their own."""
OPERATOR: Final = "operate:server"
OPEN: Final = ""
"""Instead of a scope: no key is needed; the body proves the right."""
MAX_BODY: Final = 1024 * 1024
_SEALED_IN: Final = "idempotency_keys"
_AT: Final = re.compile(r" - at `\$\.?([^`]*)`\Z")
_NAMED: Final = re.compile(r"(?:missing required|contains unknown) field `([^`]{1,64})`")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the Admin API, authenticated and allowed."""

    request: Request
    deps: Deps
    principal: Principal
    scribe: Scribe

    @property
    def db(self) -> Database:
        return self.deps.tenants.database

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def one(self, name: str) -> str | None:
        """A query parameter; empty text counts as absent, as in the real API."""
        return self.request.query_params.get(name) or None

    def many(self, name: str) -> list[str] | None:
        """A repeated query parameter, with or without brackets."""
        query = self.request.query_params
        return (query.getlist(f"{name}[]") + query.getlist(name)) or None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A query parameter that is true or false."""
        value = self.one(name)
        if value is None:
            return default
        if value not in {"true", "false"}:
            raise InvalidRequest("must be true or false", field=name)
        return value == "true"

    def number(self, name: str, default: int) -> int:
        """A query parameter that is a whole number."""
        value = self.one(name)
        if value is None:
            return default
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise InvalidRequest("must be a whole number", field=name)
        return int(value)

    def moment(self, name: str) -> datetime | None:
        """A query parameter that is a time with a zone (RFC 3339), or a date (its midnight UTC)."""
        value = self.one(name)
        if value is None:
            return None
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidRequest("must be a time such as 2026-01-31T00:00:00Z", field=name) from None
        if found.tzinfo is None:
            if len(value) > 10:
                raise InvalidRequest("must have a zone, as in 2026-01-31T00:00:00Z", field=name)
            found = found.replace(tzinfo=UTC)
        return found.astimezone(UTC)

    def page(self) -> PageRequest:
        """Which rows of a list are wanted."""
        return PageRequest(
            limit=self.number("limit", DEFAULT_LIMIT),
            after_id=self.one("after_id"),
            before_id=self.one("before_id"),
            cursor=self.one("page"),
        )

    async def raw(self) -> bytes:
        """The body as it came. Starlette keeps it, so it can be read again."""
        if not hasattr(self.request.state, "admin_body"):
            self.request.state.admin_body = await read_body(self.request, MAX_BODY)
        return bytes(self.request.state.admin_body)

    async def body(self, kind: type[T]) -> T:
        """The body, read as this type; nothing at all counts as an empty object. Raises InvalidRequest naming the field."""
        return decode(await self.raw() or b"{}", kind)

    async def see(self, read: Callable[..., Awaitable[T]], *args: Any, **kw: Any) -> T:
        """Ask a store function that takes (tx, principal, …)."""
        return await self.db.query(lambda tx: read(tx, self.principal, *args, **kw))

    async def do(self, change: Callable[..., Awaitable[T]], *args: Any, **kw: Any) -> T:
        """Run a store function that takes (tx, principal, scribe, …) in a transaction of its own."""
        return await self.db.run(lambda tx: change(tx, self.principal, self.scribe, *args, **kw))

    async def create(self, work: Callable[[AsyncConnection], Awaitable[Any]]) -> Response:
        """Run a create; with an `Idempotency-Key` header once only, and everybody who sends it gets the first answer.

        What is remembered is sealed with the organisation's data key: it may hold a secret that is shown only once.
        """
        key = self.request.headers.get("idempotency-key")
        if key is None:
            return json(await self.db.run(work))
        keys = await self.deps.tenants.org_keys.of(self.principal.org)
        mark = idempotency.fingerprint(self.request.method, self.request.url.path, await self.raw())

        async def once(tx: AsyncConnection) -> bytes:
            kept = await idempotency.begin(tx, self.principal, self.scribe, key, mark)
            if kept is not None:
                fresh = await self.deps.tenants.org_keys.of(self.principal.org, opening=kept.body)
                return fresh.open(kept.body, table=_SEALED_IN, record=key)
            answer = msgspec.json.encode(await work(tx))
            sealed = keys.seal(answer, table=_SEALED_IN, record=key)
            await idempotency.finish(tx, self.principal, key, StoredAnswer(200, sealed))
            return answer

        return Response(await self.db.run(once), media_type="application/json")


Handler = Callable[[Asked], Awaitable[Response]]

_NOBODY: Final = Principal("", None, ActorKind.USER, None, None, Role.VIEWER, frozenset())
"""Who asks on a route that needs no key: may nothing."""


@dataclass(frozen=True, slots=True)
class AdminRoute:
    """One row of the table."""

    method: str
    path: str
    scope: str
    handler: Handler
    body: type[Any] | None = None
    """The shape of the body, for the OpenAPI document."""
    query: tuple[str, ...] = ()
    """Query parameters, for the OpenAPI document."""

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().partition("\n")[0]

    def route(self) -> Route:
        """As Starlette serves it."""

        @functools.wraps(self.handler)
        async def endpoint(request: Request) -> Response:
            deps = deps_of(request)
            if self.scope == OPEN:
                return await self.handler(Asked(request, deps, _NOBODY, deps.scribe(request)))
            principal = await asking(request, deps)
            if self.scope == OPERATOR:
                require_operator(principal)
            else:
                principal.require(self.scope)
            response = await self.handler(Asked(request, deps, principal, deps.scribe(request)))
            response.headers["anthropic-organization-id"] = principal.org
            return response

        return Route(self.path, endpoint, methods=[self.method], name=f"admin:{self.method}:{self.path}")


async def asking(request: Request, deps: Deps) -> Principal:
    """Who asks, and for which organisation.

    Raises AuthenticationFailed, or NotFound for an organisation that is not there or not the caller's.
    """
    principal = await deps.authenticate(request)
    wanted = request.headers.get(ORGANIZATION_HEADER)
    if wanted is None or wanted == principal.org:
        return principal
    return await acting(deps, principal, wanted)


async def acting(deps: Deps, principal: Principal, org: str) -> Principal:
    """The operator inside an organisation. To anybody else, another organisation does not exist."""
    if org == principal.org:
        return principal
    if not principal.is_operator:
        raise NotFound(f"there is no organisation {org!r}")
    inside = principal.acting_in(org)
    found = await deps.tenants.database.query(lambda tx: get_organization(tx, inside))
    return replace(inside, is_staff=found.is_staff)


def json(content: Any, status: int = 200) -> Response:
    """An answer."""
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def page(found: Page[Any], view: Callable[[Any], Mapping[str, Any]]) -> Response:
    """A list, in both styles of the wire: neighbouring ids and cursors."""
    return json(
        {
            "data": [view(one) for one in found.data],
            "has_more": found.has_more,
            "first_id": found.first_id,
            "last_id": found.last_id,
            "next_page": found.next_page,
        }
    )


def decode(body: bytes, kind: type[T]) -> T:
    """Raises InvalidRequest that names the field, never its value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at, named = _AT.search(text), _NAMED.search(text)
        field = ".".join(filter(None, (at[1] if at else None, named[1] if named else None)))
        raise InvalidRequest(_AT.sub("", text), field=field or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None


def sliced(rows: Sequence[T], asked: Asked, ident: Callable[[T], str], *, default: int = DEFAULT_LIMIT) -> Response:
    """A cursor page of a short list that is in memory; rows are answered as they are."""
    wanted = PageRequest(limit=asked.number("limit", default), cursor=asked.one("page"))
    start = 0
    if wanted.cursor is not None:
        after = wanted.cursor.removeprefix("page_")
        start = next((index for index, row in enumerate(rows, 1) if ident(row) == after), len(rows))
    some = rows[start : start + wanted.limit]
    more = start + wanted.limit < len(rows)
    return json({"data": list(some), "has_more": more, "next_page": f"page_{ident(some[-1])}" if more else None})
