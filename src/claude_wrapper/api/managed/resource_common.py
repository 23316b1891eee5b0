"""What all routes of resources share: who asks, the body, the query, the page."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.bodies import read_body
from claude_wrapper.api.managed.workers import within_grant
from claude_wrapper.api.state import Deps, deps_of
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.ids import well_formed
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.values import Fields, missing, require_clean, time_of
from claude_wrapper.storage.pagination import Page, PageRequest
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal

T = TypeVar("T")

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100


class Query:
    """The query string, in both spellings of lists (`ids[]=a&ids[]=b`, `ids=a&ids=b`) and of ranges."""

    def __init__(self, request: Request) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            require_clean(value)
            self._values.setdefault(name.removesuffix("[]"), []).append(value)

    def many(self, name: str) -> list[str] | None:
        """All values of a list; None if it was not sent."""
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """One value; an empty one counts as not sent."""
        values = self._values.get(name)
        return values[-1] or None if values else None

    def boolean(self, name: str, *, default: bool = False) -> bool:
        """`true` or `false`. Raises InvalidRequest."""
        value = self.text(name)
        if value is None:
            return default
        if value not in {"true", "false"}:
            raise InvalidRequest("must be true or false", field=name)
        return value == "true"

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """A whole number. Raises InvalidRequest."""
        value = self.text(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 16) or not least <= int(value) <= most:
            raise InvalidRequest(f"must be a whole number from {least} to {most}", field=name)
        return int(value)

    def one_of(self, name: str, *choices: str) -> str | None:
        """One of a few words. Raises InvalidRequest."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise InvalidRequest(f"must be one of {', '.join(choices)}", field=name)
        return value

    def bound(self, name: str, side: str) -> datetime | None:
        """One end of a range: `created_at[gte]=…` or `created_at_gte=…`. Raises InvalidRequest."""
        value = self.text(f"{name}[{side}]") or self.text(f"{name}_{side}")
        # A plus sign that was not encoded has become a space.
        return None if value is None else time_of(value.replace(" ", "+"), f"{name}[{side}]")

    def page(self, *, most: int = MAX_LIMIT) -> PageRequest:
        """`limit` and `page`. Raises InvalidRequest."""
        limit = self.integer("limit", least=1, most=most) or min(DEFAULT_LIMIT, most)
        return PageRequest(limit=limit, cursor=self.text("page"))


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a caller who is known."""

    request: Request
    deps: Deps
    principal: Principal
    scribe: Scribe
    query: Query

    @property
    def means(self) -> ResourceMeans:
        """What the stores work with."""
        return self.deps.resources

    async def fields(self) -> Fields:
        """The body as an object; no body is the empty object. Raises InvalidRequest."""
        return await read_object(self.request, self.deps.settings.max_body_bytes)

    def id(self, name: str, what: str, **details: Any) -> str:
        """An id in the path; what cannot be one is answered like one that does not exist."""
        value = str(self.request.path_params[name])
        if not well_formed(value):
            raise missing(what, value.replace("\x00", ""), **details)
        return value

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work(tx)` in a read transaction."""
        return await self.deps.resources.db.query(work)

    async def write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work(tx)` in a write transaction."""
        return await self.deps.resources.db.run(work)


Handler = Callable[[Call], Awaitable[Response]]


def get(path: str, handler: Handler) -> Route:
    """A GET route."""
    return _route("GET", path, handler)


def post(path: str, handler: Handler) -> Route:
    """A POST route."""
    return _route("POST", path, handler)


def delete(path: str, handler: Handler) -> Route:
    """A DELETE route."""
    return _route("DELETE", path, handler)


def _route(method: str, path: str, handler: Handler) -> Route:
    @functools.wraps(handler)
    async def endpoint(request: Request) -> Response:
        deps = deps_of(request)
        # Who asks is settled before anything of the request is read.
        principal = await within_grant(request, deps, await deps.authenticate(request), (method, path))
        return await handler(Call(request, deps, principal, deps.scribe(request), Query(request)))

    return Route(path, endpoint, methods=[method])


async def read_object(request: Request, limit: int) -> Fields:
    """A JSON object within the bound, of what a database can keep. Raises InvalidRequest, RequestTooLarge."""
    body = await read_body(request, limit)
    if not body.strip():
        return Fields({})
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        cause = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"is not JSON: {cause}", field="body") from None
    require_clean(decoded)
    return Fields.of(decoded, "")


def answer(value: Any) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def page_answer(page: Page[Any], **view: Any) -> Response:
    """A page in the cursor style."""
    return answer({"data": [member.to_wire(**view) for member in page.data], "next_page": page.next_page})
