"""A listening socket inside a sandbox's own network, held by the server.

A socket belongs to the network namespace in which it was made, not to the process that holds it. So the server makes one
on the sandbox's loopback and accepts from outside what processes inside connect to: no forwarder runs inside, nothing is
copied twice, and the agent can neither stop it nor needs a program for it.

Two ways, tried in this order: a thread of the server enters the namespace for one moment (CAP_SYS_ADMIN; 0.4 ms), or a
helper process does it as the owner of the sandbox's user namespace (no privilege; about 25 ms) and hands the socket over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import syscalls
from claude_wrapper.sandbox.seccomp import this_architecture

LOOPBACK = "127.0.0.1"
_NEW_NETWORK = 0x40000000
_BACKLOG = 128
_SECONDS = 10.0
_PROCESS = Path(__file__).with_name("loopback_process.py")


def listen_inside(pid: int, port: int, uid: int | None) -> socket.socket:
    """A non-blocking listener on 127.0.0.1:`port` of the network that `pid` lives in. Blocks: call it in a thread.

    `uid` is the slot's own, None for the server's. Raises SandboxUnavailable with the cause.
    """
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _by_process(pid, port, uid)  # its owner may look at it where the server may not
    try:
        if os.path.samestat(os.fstat(namespace), Path("/proc/self/ns/net").stat()):
            raise SandboxUnavailable("the process shares the server's network: there is no inside to listen in")
        try:
            return _by_thread(namespace, port)
        except PermissionError:
            return _by_process(pid, port, uid)
        except OSError as error:
            raise SandboxUnavailable(
                f"cannot listen on {LOOPBACK}:{port} in the sandbox: {error.strerror or error}"
            ) from error
    finally:
        os.close(namespace)


def _by_thread(namespace: int, port: int) -> socket.socket:
    """Namespaces are entered by threads, and this one ends at once: the server's others never leave theirs."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            syscalls.call(this_architecture().numbers["setns"], namespace, _NEW_NETWORK)
            made.append(_listener(port))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="sandbox-loopback")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _listener(port: int) -> socket.socket:
    listener = socket.create_server((LOOPBACK, port), backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _by_process(pid: int, port: int, uid: int | None) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        argv = [sys.executable, "-I", "-S", str(_PROCESS), str(pid), str(port), str(theirs.fileno()), str(uid or 0)]
        try:
            done = subprocess.run(
                argv, env={}, pass_fds=(theirs.fileno(),), capture_output=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxUnavailable(f"the process that opens the sandbox's network failed: {error}") from error
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip()[-300:] or f"exit status {done.returncode}"
            raise SandboxUnavailable(f"cannot listen in the sandbox's network: {reason}")
        ours.setblocking(False)
        with contextlib.suppress(OSError):
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            if descriptors:
                listener = socket.socket(fileno=descriptors[0])
                listener.setblocking(False)
                return listener
    raise SandboxUnavailable("the process that opens the sandbox's network gave no socket")
