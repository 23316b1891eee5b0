"""The broker: opens an endpoint per slot and owns what they share."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket as sockets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claude_wrapper.broker import owncalls
from claude_wrapper.broker.breaker import BreakerView
from claude_wrapper.broker.bridge import McpBridge, Observe
from claude_wrapper.broker.calls import Binding, CallSink, Credential, Gate, Observer, TurnContext
from claude_wrapper.broker.egress import Egress, EgressSettings
from claude_wrapper.broker.endpoint import Endpoint
from claude_wrapper.broker.hosts import Resolver
from claude_wrapper.broker.http1 import Connection, Handler, Head
from claude_wrapper.broker.keeping import Caching
from claude_wrapper.broker.lines import Lines
from claude_wrapper.broker.mcp import McpClient, McpServer
from claude_wrapper.broker.means import LooseEnds, Means
from claude_wrapper.broker.owncalls import OwnAnswer
from claude_wrapper.broker.refusals import refuse
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.broker.sockets import bind_private
from claude_wrapper.broker.upstream import Upstream
from claude_wrapper.clock import Clock
from claude_wrapper.errors import ConfigurationError, Conflict, UpstreamUnavailable
from claude_wrapper.ids import Ids

SOCKET_BASE_URL = "http://broker.invalid"
"""Base URL for a process that speaks over its unix socket: a name that no resolver knows."""

_BACKLOG = 128
_LOOPBACK = "127.0.0.1"


class Broker:
    """Processes' only way to a model. `start`, then `open` an endpoint per slot, `close` at the end."""

    def __init__(
        self,
        settings: BrokerSettings,
        clock: Clock,
        ids: Ids,
        gate: Gate,
        sink: CallSink,
        *,
        observer: Observer | None = None,
        rng: random.Random | None = None,
        resolver: Resolver | None = None,
        caching: Caching | None = None,
    ) -> None:
        """`rng` spreads retries and decides nothing else; `resolver` is for egress and MCP."""
        observer = observer or Observer()
        self._means = Means(
            settings=settings,
            clock=clock,
            ids=ids,
            gate=gate,
            sink=sink,
            observer=observer,
            upstream=Upstream(settings.connect_seconds, settings.read_seconds),
            mcp=McpClient(permitted=settings.permitted_networks, resolver=resolver),
            lines=Lines(settings, clock, observer),
            loose_ends=LooseEnds(),
            rng=rng or random.Random(),  # noqa: S311 (jitter, not a secret)
            caching=caching,
        )
        self._endpoints: dict[str, Endpoint] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._loopback = _Loopback(self._means)
        self._resolver = resolver
        self._started = False

    async def start(self) -> None:
        """Get ready to open endpoints."""
        await self._means.upstream.start()
        await self._means.mcp.start()
        self._started = True

    async def close(self) -> None:
        """Close all endpoints; books of calls in flight are finished within bounds. Idempotent."""
        self._started = False
        await asyncio.gather(*(endpoint.close() for endpoint in list(self._endpoints.values())))
        await self._loopback.close()
        await self._means.loose_ends.finish(self._means.settings.finish_seconds)
        await self._means.upstream.close()
        await self._means.mcp.close()

    async def open(self, slot: str, socket: Path | None) -> Endpoint:
        """The endpoint of `slot`: on the unix socket `socket` (its directory exists and belongs to the process's uid),
        or on a loopback path with a random token.

        Raises Conflict if the slot has one already or the broker is not running, ConfigurationError if the socket
        cannot be made.
        """
        if not self._started or slot in self._endpoints:
            raise Conflict(
                f"slot {slot}: " + ("has an endpoint already" if self._started else "the broker is not running")
            )
        secret = self._secret()
        base_url = SOCKET_BASE_URL if socket is not None else await self._loopback.base_url(secret)
        endpoint = Endpoint(
            self._means,
            slot=slot,
            token=f"sk-ant-slot-{self._secret()}",
            base_url=base_url,
            socket=socket,
            on_close=self._closed,
        )
        self._endpoints[slot] = endpoint
        if socket is None:
            self._loopback.add(secret, endpoint)
            return endpoint
        try:
            self._servers[slot] = await _listen(socket, endpoint, self._means.settings)
        except OSError as error:
            del self._endpoints[slot]
            raise ConfigurationError(f"cannot listen on {socket}: {error.strerror or error}") from error
        return endpoint

    async def open_egress(
        self, slot: str, where: Path | sockets.socket, settings: EgressSettings | None = None
    ) -> Egress:
        """The slot's CONNECT proxy on a listener or a unix socket at a path. It allows nothing until `Egress.allow`; the
        caller closes it. Raises ConfigurationError."""
        settings = settings or EgressSettings(permitted=self._means.settings.permitted_networks)
        egress = Egress(slot, self._means.observer, settings=settings, resolver=self._resolver)
        await egress.start(where)
        return egress

    def mcp_bridge(self, server: McpServer, observe: Observe | None = None) -> McpBridge:
        """A conversation with a remote MCP server for the CLI's `mcp_message` requests; the caller closes it."""
        return McpBridge(self._means.mcp, server, observe=observe or self._means.observer.mcp_message)

    async def ask(self, binding: Binding, turn: TurnContext, body: Mapping[str, Any]) -> OwnAnswer:
        """A Messages request of the server itself for a session; see `owncalls.ask`."""
        return await owncalls.ask(self._means, binding, turn, body)

    def refuse_while_shut(self, credential: Credential) -> None:
        """Raise UpstreamUnavailable while the breaker of this upstream and credential is open: before work is begun.

        Not where something may stand in for them: who can be asked then is decided per request.
        """
        seconds = self._means.lines.shut(credential) if credential.standby is None else None
        if seconds is not None:
            raise UpstreamUnavailable(
                "the model API has failed several times in a row for this credential; it is not asked until it has had a rest",
                retry_after=seconds,
            )

    def breakers(self) -> tuple[BreakerView, ...]:
        """Breakers that have seen failures."""
        return self._means.lines.views()

    def _secret(self) -> str:
        """Two identifiers' worth of randomness: 260 bits."""
        return "".join(self._means.ids.new("x").partition("_")[2] for _ in range(2))

    async def _closed(self, endpoint: Endpoint) -> None:
        self._endpoints.pop(endpoint.slot, None)
        self._loopback.remove(endpoint)
        server = self._servers.pop(endpoint.slot, None)
        if server is not None:
            server.close()
        if endpoint.socket is not None:
            with contextlib.suppress(OSError):
                endpoint.socket.unlink()


async def _listen(path: Path, endpoint: Endpoint, settings: BrokerSettings) -> asyncio.Server:
    """Listen so that only the owner of the socket's directory can connect."""
    listener = bind_private(path)
    try:
        loop = asyncio.get_running_loop()
        return await loop.create_unix_server(lambda: Connection(endpoint, settings), sock=listener, backlog=_BACKLOG)
    except BaseException:
        listener.close()
        raise


class _Loopback:
    """One TCP listener for all slots that have no socket; a path token of 260 bits tells them apart."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._by_secret: dict[str, Endpoint] = {}
        self._of_connection: dict[Connection, Endpoint | None] = {}
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def base_url(self, secret: str) -> str:
        async with self._starting:
            if self._server is None:
                settings = self._means.settings
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(
                    lambda: Connection(self, settings), _LOOPBACK, 0, backlog=_BACKLOG
                )
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{_LOOPBACK}:{port}/{secret}"

    def add(self, secret: str, endpoint: Endpoint) -> None:
        self._by_secret[secret] = endpoint

    def remove(self, endpoint: Endpoint) -> None:
        for secret in [secret for secret, known in self._by_secret.items() if known is endpoint]:
            del self._by_secret[secret]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._of_connection):
            connection.abort()

    def enter(self, connection: Connection) -> bool:
        if len(self._of_connection) >= self._means.settings.max_connections * max(1, len(self._by_secret)):
            return False
        self._of_connection[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        endpoint = self._of_connection.pop(connection, None)
        if endpoint is not None:
            endpoint.leave(connection)

    def choose(self, head: Head, connection: Connection) -> Handler:
        if not head.target.startswith("/"):
            raise refuse(404, "not_found_error", "There is nothing here.")
        secret, slash, rest = head.target[1:].partition("/")
        endpoint = self._by_secret.get(secret)
        if endpoint is None:
            raise refuse(404, "not_found_error", "There is nothing here.")
        head.target = slash + rest if slash else "/"
        self._settle(connection, endpoint)
        return endpoint.choose(head, connection)

    def _settle(self, connection: Connection, endpoint: Endpoint) -> None:
        """A connection belongs to the endpoint that it asked first."""
        known = self._of_connection.get(connection)
        if known is endpoint:
            return
        if known is not None or not endpoint.enter(connection):
            raise refuse(429, "rate_limit_error", "Too many connections to this endpoint.", 1)
        self._of_connection[connection] = endpoint

    def fault(self, error: BaseException) -> None:
        self._means.observer.fault("loopback listener", error)
