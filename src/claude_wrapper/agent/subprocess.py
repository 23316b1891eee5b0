"""The real transport: a child process in its own session, with pipes that never grow without bound.

The process id is ours until we say so. The exit is noticed through a pidfd, *before* the zombie is reaped: while the
zombie stands, its pid and process group cannot be given to anybody else, so the last kill of the group cannot hit a
stranger. Then it is reaped. (asyncio's own watcher reaps at once, and costs a thread per process before Python 3.12.)

A grandchild that holds stdout open cannot keep the transport alive: the group is killed when the leader exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Awaitable
from typing import IO, cast

from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.agent.transport import Ending, ExitReport
from claude_wrapper.clock import Clock
from claude_wrapper.errors import AgentCrashed, SpawnFailed
from claude_wrapper.sandbox.port import Launch, Sandbox, SlotDirs

_CHUNK = 128 * 2**10
_STDIN_HIGH = 256 * 2**10
_LAST_LINES_SECONDS = 1.0


class _StdinProtocol(asyncio.streams.FlowControlMixin):
    """Flow control for the write pipe; the stream writer needs nothing else."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._gone = loop.create_future()

    @property
    def gone(self) -> bool:
        """Whether the pipe was closed; its transport must not be touched any more."""
        return self._gone.done()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self._gone.done():
            self._gone.set_result(None)

    def _get_close_waiter(self, stream: asyncio.StreamWriter) -> asyncio.Future[None]:
        return self._gone


class _StdoutProtocol(asyncio.StreamReaderProtocol):
    """The stream reader's protocol, which also says when the pipe has ended."""

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.ended = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.ended.set()


class _Tail(asyncio.Protocol):
    """Drains stderr and keeps its end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        while self._size - len(self._chunks[0]) >= self._limit:
            self._size -= len(self._chunks.popleft())

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def text(self) -> str:
        return b"".join(self._chunks)[-self._limit :].decode("utf-8", "replace")


class ProcessTransport:
    """One child process. Create with `spawn`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        sandbox: Sandbox,
        dirs: SlotDirs,
        clock: Clock,
        settings: AgentSettings,
    ) -> None:
        """Use `spawn`: the pipes are connected there."""
        self._process = process
        self._sandbox = sandbox
        self._dirs = dirs
        self._clock = clock
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._exit = self._loop.create_future()  # resolved when the process has ended; it may still be a zombie
        self._pidfd: int | None = None
        self._returncode: int | None = None
        self._main_pid: int | None = None
        self._stopping: asyncio.Task[ExitReport] | None = None
        self._stdout: asyncio.StreamReader
        self._stdout_protocol: _StdoutProtocol | None = None
        self._stdout_pipe: asyncio.ReadTransport | None = None
        self._stderr_pipe: asyncio.ReadTransport | None = None
        self._stdin: asyncio.StreamWriter | None = None
        self._stdin_protocol: _StdinProtocol | None = None
        self._tail = _Tail(settings.stderr_bytes)

    @classmethod
    async def spawn(
        cls, launch: Launch, *, sandbox: Sandbox, dirs: SlotDirs, clock: Clock, settings: AgentSettings
    ) -> ProcessTransport:
        """Start the process. Raises SpawnFailed. Closes the launch's descriptors in any case."""
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 (vfork: 0.3 ms; asyncio's own spawn does the same call)
                launch.argv,
                env=launch.env,
                cwd=launch.cwd,
                pass_fds=launch.pass_fds,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except (OSError, ValueError) as error:
            raise SpawnFailed(
                f"{launch.argv[0] if launch.argv else 'nothing'} could not be started: {error}"
            ) from error
        finally:
            launch.close_fds()
        transport = cls(process, sandbox=sandbox, dirs=dirs, clock=clock, settings=settings)
        try:
            transport._watch_exit()
            await transport._connect()
        except BaseException:
            await transport.stop(grace=0, term_grace=0)
            raise
        return transport

    @property
    def pid(self) -> int:
        """The spawned process."""
        return self._process.pid

    @property
    def main_pid(self) -> int:
        """The CLI itself, which a sandbox may have put behind helpers."""
        if self._main_pid is None and self._returncode is None:
            found = self._sandbox.main_pid(self.pid)
            if found == self.pid:
                return found  # not behind helpers, or not yet
            self._main_pid = found
        return self._main_pid if self._main_pid is not None else self.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; also known before it was reaped."""
        return self._returncode

    @property
    def stderr_tail(self) -> str:
        """The last bytes of stderr, as text."""
        return self._tail.text()

    async def read(self) -> bytes:
        """The next chunk of stdout; empty at the end."""
        return await self._stdout.read(_CHUNK)

    async def write(self, line: bytes) -> None:
        """One whole line to stdin."""
        stdin = self._stdin
        if stdin is None or stdin.is_closing():
            raise self._crashed()
        try:
            stdin.write(line)
            await stdin.drain()
        except (OSError, RuntimeError):
            raise self._crashed() from None

    async def exited(self) -> int | None:
        """The exit code, when there is one."""
        await asyncio.shield(self._exit)
        return self._returncode

    def freeze(self) -> None:
        """Through the sandbox, which knows the whole tree."""
        if not self._exit.done():
            self._sandbox.freeze(self.pid, self._dirs)

    def thaw(self) -> None:
        """Undo `freeze`."""
        if not self._exit.done():
            self._sandbox.thaw(self.pid, self._dirs)

    async def stop(self, *, grace: float, term_grace: float) -> ExitReport:
        """See the port."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace, term_grace), name=f"agent-stop-{self.pid}")
        return await asyncio.shield(self._stopping)

    def hurry(self) -> None:
        """SIGKILL to the group."""
        self._signal_group(signal.SIGKILL)

    def abort(self) -> None:
        """Kill and reap at once, without awaiting anything."""
        self._signal_group(signal.SIGKILL)
        self._close_pipes()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._returncode = self._process.wait(0.5)  # SIGKILL takes a millisecond; this leaves no zombie
        self._forget_pidfd()

    # Spawning ----------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        loop, process = self._loop, self._process
        self._stdout = asyncio.StreamReader(limit=_CHUNK, loop=loop)
        protocol = self._stdout_protocol = _StdoutProtocol(self._stdout, loop)
        self._stdout_pipe = (await loop.connect_read_pipe(lambda: protocol, cast("IO[bytes]", process.stdout)))[0]
        self._stderr_pipe = (await loop.connect_read_pipe(lambda: self._tail, cast("IO[bytes]", process.stderr)))[0]
        pipe, flow = await loop.connect_write_pipe(lambda: _StdinProtocol(loop), cast("IO[bytes]", process.stdin))
        pipe.set_write_buffer_limits(high=_STDIN_HIGH)
        self._stdin_protocol = flow
        self._stdin = asyncio.StreamWriter(pipe, flow, None, loop)

    def _watch_exit(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # an old kernel, or a filter that forbids it: a thread waits instead
            threading.Thread(target=self._wait_in_thread, name=f"agent-wait-{self.pid}", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd, self._has_exited)

    def _wait_in_thread(self) -> None:
        with contextlib.suppress(OSError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._has_exited)

    def _has_exited(self) -> None:
        self._forget_pidfd()
        if self._exit.done():
            return
        with contextlib.suppress(OSError):
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if status is not None:
                killed = status.si_code in {os.CLD_KILLED, os.CLD_DUMPED}
                self._returncode = -status.si_status if killed else status.si_status
        self._exit.set_result(None)

    def _forget_pidfd(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    # Ending ------------------------------------------------------------------------------------------------------

    async def _stop(self, grace: float, term_grace: float) -> ExitReport:
        started = self._clock.monotonic()
        try:
            ending = await self._end(grace, term_grace)
            await self._bury()
        except asyncio.CancelledError:  # the loop itself is being torn down: nothing may be awaited any more
            self.abort()
            raise
        return ExitReport(self._returncode, ending, self._clock.monotonic() - started, self.stderr_tail)

    async def _end(self, grace: float, term_grace: float) -> Ending:
        if self._exit.done():
            return Ending.BY_ITSELF
        self.thaw()  # a stopped process sees neither the end of its input nor SIGTERM
        if self._stdin is not None:
            self._stdin.close()
        if grace > 0 and await self._exits_within(grace):
            return Ending.END_OF_INPUT
        if term_grace > 0:
            self._signal_group(signal.SIGTERM)
            if await self._exits_within(term_grace):
                return Ending.TERMINATED
        await self._kill_all()
        if await self._exits_within(self._settings.kill_seconds):
            return Ending.KILLED
        return Ending.UNKNOWN

    async def _bury(self) -> None:
        """The leader is a zombie or gone: end what it left behind, then let go of the pid and the pipes."""
        await self._kill_all()
        if self._stdout_protocol is not None:  # its last lines may still be in the pipe
            await _within(_LAST_LINES_SECONDS, self._stdout_protocol.ended.wait())
        self._forget_pidfd()
        self._close_pipes()
        with contextlib.suppress(OSError):
            code = self._process.poll()
            self._returncode = code if code is not None else self._returncode
        await _within(self._settings.kill_seconds, self._tail.ended.wait())

    async def _kill_all(self) -> None:
        if not await _within(self._settings.kill_seconds, self._sandbox.kill(self.pid, self._dirs)):
            self._signal_group(signal.SIGKILL)

    async def _exits_within(self, seconds: float) -> bool:
        await _within(seconds, asyncio.shield(self._exit))
        return self._exit.done()

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # not reaped, so the group's number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _close_pipes(self) -> None:
        if self._stdin is not None and self._stdin_protocol is not None and not self._stdin_protocol.gone:
            self._stdin.transport.abort()
        for pipe in (self._stdout_pipe, self._stderr_pipe):
            if pipe is not None:
                pipe.close()
        if self._stderr_pipe is None:
            self._tail.ended.set()
        for pipe_file in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe_file is not None and self._stdin is None:  # never connected: the loop does not close them
                pipe_file.close()

    def _crashed(self) -> AgentCrashed:
        return crashed(self._returncode, self.stderr_tail)


async def _within(seconds: float, awaitable: Awaitable[object]) -> bool:
    """Wait at most so long; whether it came to an end."""
    try:
        async with asyncio.timeout(seconds):
            await awaitable
    except TimeoutError:
        return False
    return True


def crashed(returncode: int | None, stderr_tail: str) -> AgentCrashed:
    """The error for a process that ended by itself."""
    how = "no longer reads its input" if returncode is None else f"ended with exit code {returncode}"
    tail = stderr_tail.strip()[-2000:]
    return AgentCrashed(
        f"the Claude process {how}" + (f"; its last words: {tail}" if tail else ""),
        details={"exit_code": returncode},
    )
