"""An allow-listing CONNECT proxy for a sandbox with network: package registries, git hosts, chosen domains.

It accepts from a listener that the server holds inside the sandbox's own network (`sandbox.loopback`), which the process
knows as `HTTPS_PROXY`, or from a unix socket. Names are resolved out here, private, link-local and metadata addresses are refused after resolution, and the address that was
checked is the one that is dialled. Everything asked for is told to the observer.

Not defended: what is said inside an allowed tunnel (TLS is not opened). A host that serves anybody's content can carry
data out: keep the list short.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

import structlog

from claude_wrapper.broker.addresses import Network
from claude_wrapper.broker.calls import Observer
from claude_wrapper.broker.hosts import HostRules, Resolver, SystemResolver, addresses_of, canonical
from claude_wrapper.broker.sockets import bind_private
from claude_wrapper.errors import ConfigurationError, PermissionDenied, UpstreamUnavailable

log = structlog.get_logger(__name__)

_PIECE = 64 * 1024
_LOGGED_REFUSALS = 20
"""Per slot and list of hosts: an agent that asks in a loop must not fill the log. All of them are counted."""


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """Bounds of one slot's proxy."""

    max_tunnels: int = 64
    max_head_bytes: int = 8 * 1024
    head_seconds: float = 10.0
    """Time for a request to arrive."""
    dial_seconds: float = 10.0
    """Time for a connection to one address."""
    idle_seconds: float = 300.0
    """Longest silence of a tunnel in both directions."""
    permitted: tuple[Network, ...] = ()
    """The operator's own networks that may be reached although they are private."""


class _Denied(Exception):
    def __init__(self, status: int, phrase: str, reason: str) -> None:
        self.status, self.phrase, self.reason = status, phrase, reason
        super().__init__(reason)


class Egress:
    """One slot's proxy. `start`, set `rules` when the slot is bound, `close`."""

    def __init__(
        self, slot: str, observer: Observer, *, settings: EgressSettings | None = None, resolver: Resolver | None = None
    ) -> None:
        self.slot = slot
        self._observer = observer
        self._settings = settings or EgressSettings()
        self._resolver = resolver or SystemResolver()
        self._rules = HostRules()
        self._server: asyncio.Server | None = None
        self._tunnels: set[asyncio.Task[None]] = set()
        self._socket: Path | None = None
        self.opened = 0
        """Tunnels so far."""
        self.refused = 0
        """Attempts so far that the list or the address forbade."""
        self._logged = 0

    @property
    def rules(self) -> HostRules:
        return self._rules

    def allow(self, rules: HostRules) -> None:
        """What the slot's tenant may reach from now on. Open tunnels are closed: they were allowed to somebody else."""
        self._rules = rules
        self._logged = 0
        for tunnel in self._tunnels:
            tunnel.cancel()

    async def start(self, where: Path | socket.socket) -> None:
        """Accept on a listener, which is closed at the end; or listen on a unix socket at this path, for the owner of its
        directory only. Raises ConfigurationError."""
        bound = self._settings.max_head_bytes
        if isinstance(where, socket.socket):
            self._server = await asyncio.start_server(self._serve, sock=where, limit=bound)
            return
        try:
            listener = bind_private(where)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {where}: {error.strerror or error}") from error
        self._socket = where
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=bound)

    async def close(self) -> None:
        """Close all tunnels and stop listening. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.allow(HostRules())
        if self._tunnels:
            await asyncio.wait(list(self._tunnels), timeout=1)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.unlink()
            self._socket = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._tunnels) >= self._settings.max_tunnels:
            writer.transport.abort()
            return
        self._tunnels.add(task)
        try:
            await self._tunnel(reader, writer)
        except asyncio.CancelledError:
            # The rules changed or the proxy closes. Swallowed: the stream server would log its own handler's end.
            writer.transport.abort()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except Exception as error:  # noqa: BLE001 (one tunnel must not take the proxy down)
            self._observer.fault(f"egress of slot {self.slot}", error)
            writer.transport.abort()
        finally:
            self._tunnels.discard(task)
            writer.close()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._settings.head_seconds):
            head = await reader.readuntil(b"\r\n\r\n")
        try:
            host, port = _target(head)
            far_reader, far_writer = await self._open(host, port)
        except _Denied as denied:
            body = f"{denied.reason}\n".encode()
            writer.write(
                f"HTTP/1.1 {denied.status} {denied.phrase}\r\ncontent-type: text/plain\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await writer.drain()
            return
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._pump(reader, writer, far_reader, far_writer)
        finally:
            far_writer.transport.abort()

    async def _open(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Check, resolve, check again, dial. Raises _Denied."""
        try:
            if not self._rules.allows(host, port):
                raise PermissionDenied(f"{host}:{port} is not on the list of allowed hosts")
            addresses = await addresses_of(host, port, self._resolver, self._settings.permitted)
        except PermissionDenied as error:
            self._note_refusal(host, port, error.message)
            raise _Denied(403, "Forbidden", error.message) from error
        except UpstreamUnavailable as error:
            self._observer.egress(self.slot, host, port, allowed=True, reason=error.message)
            raise _Denied(502, "Bad Gateway", error.message) from error
        for address in addresses:
            try:
                async with asyncio.timeout(self._settings.dial_seconds):
                    opened = await asyncio.open_connection(address, port, limit=_PIECE)
            except (OSError, TimeoutError):
                continue
            self.opened += 1
            self._observer.egress(self.slot, host, port, allowed=True, reason="")
            return opened
        self._observer.egress(self.slot, host, port, allowed=True, reason="cannot be reached")
        raise _Denied(502, "Bad Gateway", f"{host}:{port} cannot be reached")

    def _note_refusal(self, host: str, port: int, reason: str) -> None:
        self.refused += 1
        self._observer.egress(self.slot, host, port, allowed=False, reason=reason)
        if self._logged < _LOGGED_REFUSALS:
            self._logged += 1
            log.warning(
                "egress.refused",
                slot=self.slot,
                host=host,
                port=port,
                reason=reason,
                refused=self.refused,
                last_logged=self._logged == _LOGGED_REFUSALS,
            )

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Both directions until both have ended, or both were silent for too long."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._settings.idle_seconds) as idle:

            async def one_way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(_PIECE):
                    idle.reschedule(loop.time() + self._settings.idle_seconds)
                    sink.write(data)
                    await sink.drain()
                if sink.can_write_eof():
                    sink.write_eof()

            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(one_way(reader, far_writer))
                    both.create_task(one_way(far_reader, writer))
            except* OSError as reset:
                del reset  # one side reset its connection: the tunnel is over


def _target(head: bytes) -> tuple[str, int]:
    """Host and port of a CONNECT request. Raises _Denied."""
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
        raise _Denied(400, "Bad Request", "this is not an HTTP request")
    if parts[0] != b"CONNECT":
        raise _Denied(405, "Method Not Allowed", "only CONNECT (https) is supported")
    name, colon, digits = parts[1].decode("latin-1").rpartition(":")
    host = canonical(name)
    if (
        not colon
        or host is None
        or not (digits.isascii() and digits.isdigit() and len(digits) < 6 and 0 < int(digits) < 65536)
    ):
        raise _Denied(400, "Bad Request", "the target of CONNECT must be a host name and a port")
    return host, int(digits)
