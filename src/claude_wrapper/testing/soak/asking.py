"""One request and what became of it, told apart: answered, refused clearly, lost, or unclear."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from claude_wrapper.testing.soak import outcomes

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

    @property
    def ok(self) -> bool:
        return self.how == "answered"


@dataclass(eq=False)
class Asker:
    """Requests of one tenant. `base` changes with the server's port."""

    http: aiohttp.ClientSession
    base: str
    key: str
    up: asyncio.Event
    """Set while there is a server."""

    async def ask(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        raw: bool = False,
    ) -> Reply:
        """`raw`: the body of an answer is bytes, not JSON."""
        sent = {"x-api-key": self.key, **(headers or {})}
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with self.http.request(method, self.base + path, json=json, data=data, headers=sent) as response:
                    request = response.headers.get("request-id", "")
                    if response.status == 200:
                        body = await (response.read() if raw else response.json())
                        return Reply("answered", 200, body, request=request)
                    return refusal(response.status, await response.json(), request)
        except TimeoutError:
            return Reply("unclear", detail=f"no answer within {ANSWER_SECONDS:g} s")
        except (aiohttp.ClientError, ConnectionError) as error:
            return Reply("lost", detail=type(error).__name__)
        except (ValueError, KeyError, TypeError) as error:
            return Reply("unclear", detail=f"{type(error).__name__}: {error}")

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


def refusal(status: int, body: Any, request: str) -> Reply:
    """An error, clear or not. Raises KeyError or TypeError for one that has not the API's shape."""
    error = body["error"]
    clear = status in outcomes.CLEAR and error["type"] and error["message"] and body["request_id"]
    detail = str(error.get("code"))
    return Reply("refused" if clear else "unclear", status, body, detail if clear else f"{detail} {body}", request)
