"""`claude-wrapper serve`: uvicorn around the application, with a drain of our own.

uvicorn alone waits without end for open streams on SIGTERM, or cuts them all at its one time-out (measured). Here the
first SIGTERM or SIGINT stops new work (503 with `retry-after`), lets running turns and streams end within
`drain_seconds`, and only then closes; a second signal closes at once.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable

import click
import uvicorn

from claude_wrapper.app import Server, running_server
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError
from claude_wrapper.sandbox.loopdisk import private_mounts

_CUT_SECONDS = 2
"""After the drain, connections that are still open get this long to be closed."""


def run(settings: Settings, *, reload: Callable[[], Settings] | None = None) -> int:
    """Serve until a signal. Returns the exit code. `reload` reads the settings again, on SIGHUP."""
    if settings.sandbox_disk == "loop":
        private_mounts()
    return asyncio.run(serve(settings, announce=_announce, reload=reload))


async def serve(
    settings: Settings,
    *,
    announce: Callable[[str, Server], None],
    stop: asyncio.Event | None = None,
    reload: Callable[[], Settings] | None = None,
) -> int:
    """Serve until `stop` is set or a signal arrives."""
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    stop = stop or asyncio.Event()
    cut = asyncio.Event()

    def on_signal() -> None:
        (cut if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    shown = f"[{host}]" if ":" in host else host
    async with running_server(settings, address=f"http://{shown}:{port}") as server:
        http = uvicorn.Server(
            uvicorn.Config(
                server.app,
                http="httptools",
                loop="asyncio",  # uvloop blocks the whole loop at each spawn, in proportion to our memory
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=_CUT_SECONDS,
                server_header=False,
            )
        )
        if reload is not None:
            loop.add_signal_handler(signal.SIGHUP, lambda: server.reload(reload))
        http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.ensure_future(_serve_without_signals(http, listener))
        announce(f"http://{host}:{port}", server)
        waiting = asyncio.ensure_future(stop.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not serving.done():
            await server.drain(settings.drain_seconds, cut)
            http.should_exit = True
        await serving
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.remove_signal_handler(number)
    return 0


async def _serve_without_signals(http: uvicorn.Server, listener: socket.socket) -> None:
    # `serve()` would take over SIGTERM and SIGINT; the part below it does not.
    await http._serve([listener])  # noqa: SLF001


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named so that asyncio switches Nagle off: else each streamed answer waits 40 ms for an ack.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.set_inheritable(False)
    listener.listen(2048)
    return listener


def _announce(url: str, server: Server) -> None:
    # What the start has made stays. Looking through it again in each full collection held up every stream for 60 to
    # 150 ms (measured), some times a minute.
    gc.collect()
    gc.freeze()
    click.secho(f"claude-wrapper listens on {url}", bold=True)
    click.echo(f"  sandbox         {server.sandbox_level}   security level {server.security_level}")
    click.echo(f"  data            {server.data_dir}")
    if server.new_admin_key:
        click.secho(f"  operator's key  {server.new_admin_key}", fg="yellow")
        click.echo("                  shown once; it is kept only as a hash. CLAUDE_WRAPPER_ADMIN_KEY sets your own.")
