"""A broker in front of the scripted upstream, and a process's end of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from claude_wrapper.broker import (
    Binding,
    Broker,
    BrokerSettings,
    Credential,
    CredentialKind,
    Endpoint,
    Observer,
    TurnContext,
    UpstreamCall,
)
from claude_wrapper.clock import SystemClock
from claude_wrapper.testing import ScriptedUpstream, SequentialIds

MODEL = "claude-sonnet-5-5"
SECRET = "sk-ant-real-secret"


class Books:
    """Gate and sink that remember; `refuse` is raised by the next reservation."""

    def __init__(self) -> None:
        self.reserved: list[str] = []
        self.settled: list[UpstreamCall] = []
        self.cancelled = 0
        self.recorded: list[UpstreamCall] = []
        self.refuse: Exception | None = None
        self.pause: Callable[[str], Any] | None = None

    async def _point(self, name: str) -> None:
        if self.pause is not None:
            await self.pause(name)

    async def reserve(self, binding: Binding, turn: TurnContext | None, model: str, estimate: Any) -> Books._Held:
        await self._point("reserve")
        if self.refuse is not None:
            raise self.refuse
        self.reserved.append(model)
        await self._point("reserved")
        return Books._Held(self)

    async def record(self, call: UpstreamCall) -> None:
        await self._point("record")
        self.recorded.append(call)

    class _Held:
        def __init__(self, books: Books) -> None:
            self._books = books

        async def settle(self, call: UpstreamCall) -> None:
            await self._books._point("settle")
            self._books.settled.append(call)

        async def cancel(self) -> None:
            self._books.cancelled += 1

    @property
    def balanced(self) -> bool:
        return len(self.reserved) == len(self.settled) + self.cancelled


class Noted(Observer):
    def __init__(self) -> None:
        self.faults: list[tuple[str, BaseException]] = []
        self.lates: list[str] = []
        self.retries: list[tuple[int, int, float]] = []
        self.breakers: list[str] = []
        self.spent: list[int] = []
        self.egressed: list[tuple[str, int, bool, str]] = []
        self.calls: list[UpstreamCall] = []
        self.models: list[tuple[str, str]] = []

    def model_refused(self, binding: Binding, model: str, asked: str) -> None:
        self.models.append((model, asked))

    def fault(self, where: str, error: BaseException) -> None:
        self.faults.append((where, error))

    def late(self, where: str) -> None:
        self.lates.append(where)

    def retrying(self, binding: Binding, attempt: int, status: int, delay: float) -> None:
        self.retries.append((attempt, status, delay))

    def retries_spent(self, binding: Binding, status: int) -> None:
        self.spent.append(status)

    def breaker(self, upstream: str, credential_id: str, state: str) -> None:
        self.breakers.append(str(state))

    def egress(self, slot: str, host: str, port: int, allowed: bool, reason: str) -> None:
        self.egressed.append((host, port, allowed, reason))

    def finished(self, call: UpstreamCall) -> None:
        self.calls.append(call)


def credential(url: str, **changes: Any) -> Credential:
    values: dict[str, Any] = {"id": "cred_1", "kind": CredentialKind.API_KEY, "secret": SECRET, "base_url": url}
    return Credential(**(values | changes))


def binding(url: str, *, session: str = "sesn_1", org: str = "org_1", **changes: Any) -> Binding:
    return Binding(
        org=org,
        workspace="wrkspc_1",
        key_id="apikey_1",
        user="user_1",
        session=session,
        credential=credential(url, **changes),
    )


def turn(**changes: Any) -> TurnContext:
    return TurnContext(**({"turn": "turn_1", "model": MODEL} | changes))


def request_body(text: str = "hello", **changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
    }
    return body | changes


@dataclass
class Process:
    """What a CLI does with its endpoint."""

    endpoint: Endpoint
    session: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, body: Any, path: str = "/v1/messages?beta=true", **headers: str) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        return self.session.post(
            self.endpoint.base_url + path, data=data, headers=self.headers | headers, allow_redirects=False
        )

    def get(self, path: str, method: str = "GET") -> Any:
        return self.session.request(method, self.endpoint.base_url + path, headers=self.headers)


class World:
    """Everything that a test needs; use as `async with`."""

    def __init__(self, tmp: Path, settings: BrokerSettings | None = None, clock: Any = None) -> None:
        self.tmp = tmp
        self.books = Books()
        self.noted = Noted()
        self.clock = clock or SystemClock()
        self.upstream = ScriptedUpstream()
        self.broker = Broker(
            settings or BrokerSettings(finish_seconds=1.0, retry_base_seconds=0.001),
            self.clock,
            SequentialIds(),
            self.books,
            self.books,
            observer=self.noted,
            rng=random.Random(1),
        )
        self._stack = AsyncExitStack()
        self._opened = 0

    async def __aenter__(self) -> World:
        await self._stack.enter_async_context(self.upstream)
        await self.broker.start()
        self._stack.push_async_callback(self.broker.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def process(self, *, unix: bool = True, bound: bool = True, begun: bool = True, **changes: Any) -> Process:
        """A slot with its process; bound to a session with a turn begun, unless said otherwise."""
        self._opened += 1
        run = self.tmp / f"s{self._opened}"
        run.mkdir()
        endpoint = await self.broker.open(f"slot_{self._opened}", run / "api.sock" if unix else None)
        connector = aiohttp.UnixConnector(str(run / "api.sock")) if unix else aiohttp.TCPConnector()
        session = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        if bound:
            endpoint.bind(binding(self.upstream.url, **changes))
            if begun:
                endpoint.begin(turn())
        headers = {"x-api-key": endpoint.token, "anthropic-version": "2023-06-01", "content-type": "application/json"}
        return Process(endpoint, session, headers)


def encoded_request(text: str = "hello", **changes: Any) -> bytes:
    return json.dumps(request_body(text, **changes), separators=(",", ":")).encode()
