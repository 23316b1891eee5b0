"""One request and what became of it, told apart: answered, refused clearly, lost, or unclear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp

from claude_wrapper.testing.soak import outcomes
from claude_wrapper.testing.soak.fleet import Fleet
from claude_wrapper.testing.soak.served import Served

ANSWER_SECONDS: Final = 90.0
"""Whoever has no answer by then was left alone: no time limit of the server is that long."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `how` is that of an `Outcome`."""

    how: str
    status: int = 0
    body: Any = field(default=None, repr=False)
    detail: str = ""
    request: str = ""
    replica: int = -1
    """Which one was asked last; -1: none."""
    again: bool = False
    """Another replica may be asked the same: this one was not reached, or says so (503 with `retry-after`)."""
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return self.how == "answered"


@dataclass(eq=False)
class Asker:
    """Requests of one tenant, through the balancer."""

    http: aiohttp.ClientSession
    fleet: Fleet
    key: str

    @property
    def up(self) -> asyncio.Event:
        """Set while there is a server."""
        return self.fleet.up

    async def ask(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        raw: bool = False,
        at: Served | None = None,
        repeat: bool = True,
    ) -> Reply:
        """`raw`: the body of an answer is bytes, not JSON. `at`: this replica and no other.

        What another replica may be asked is asked once more there, unless `repeat` is False or a form would have to be
        sent twice.
        """
        sent = {"x-api-key": self.key, **(headers or {})}

        async def once(replica: Served) -> Reply:
            began = time.monotonic()
            url = replica.url + path
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    async with self.http.request(method, url, json=json, data=data, headers=sent) as response:
                        request = response.headers.get("request-id", "")
                        if response.status == 200:
                            body = await (response.read() if raw else response.json())
                            return Reply("answered", 200, body, "", request, replica.number)
                        return await refused(response, replica)
            except TimeoutError:
                return Reply("unclear", detail=f"no answer within {ANSWER_SECONDS:g} s", replica=replica.number)
            except aiohttp.ContentTypeError as error:
                return Reply("unclear", error.status, None, "an answer that is no JSON", replica=replica.number)
            except (aiohttp.ClientError, ConnectionError) as error:
                if at is None:  # whoever asks a certain one looks whether it is there
                    self.fleet.lost(replica, began, f"{method} {path}: {type(error).__name__}")
                return Reply("lost", detail=type(error).__name__, replica=replica.number, again=True)
            except (ValueError, KeyError, TypeError) as error:
                return Reply("unclear", detail=f"{type(error).__name__}: {error}", replica=replica.number)

        first = at or self.fleet.choose()
        reply = await once(first)
        once_only = at is not None or not repeat or isinstance(data, aiohttp.FormData)
        another = self.fleet.another(first) if reply.again and not once_only else None
        if another is None:
            return reply
        self.fleet.repeats += 1
        return replace(await once(another), attempts=2)

    async def insist(self, method: str, path: str, seconds: float = ANSWER_SECONDS, **kw: Any) -> Reply:
        """Ask until it is answered or clearly somebody's own fault (a status below 500 that is not 429)."""
        reply = Reply("lost")
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self.up.wait()
                    reply = await self.ask(method, path, **kw)
                    if reply.ok or (reply.how == "refused" and reply.status < 500 and reply.status != 429):
                        return reply
                    await asyncio.sleep(0.3)
        except TimeoutError:
            return reply


async def refused(response: aiohttp.ClientResponse, replica: Served) -> Reply:
    """An error of a replica, clear or not. Raises ValueError, KeyError or TypeError for one that has not the API's shape."""
    status, body = response.status, await response.json()
    error, request = body["error"], response.headers.get("request-id", "")
    clear = status in outcomes.CLEAR and error["type"] and error["message"] and body["request_id"]
    detail = str(error.get("code"))
    again = status == 503 and "retry-after" in response.headers
    if not clear:
        return Reply("unclear", status, body, f"{detail} {body}", request, replica.number)
    return Reply("refused", status, body, detail, request, replica.number, again)
