"""Unix sockets that only one tenant can connect to."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def bind_private(path: Path) -> socket.socket:
    """A unix socket at `path`, mode 0600, owned by the owner of its directory.

    The directory belongs to the tenant: it is opened without following a link, and the socket's mode is set before it
    has a name (Linux takes it from the descriptor), so nothing is ever changed through a path that could be swapped.
    Paths longer than a socket address are reached through the directory's descriptor.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        owner = os.fstat(directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=directory)  # left by a server that was killed
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        if owner.st_uid != os.geteuid():
            os.chown(path.name, owner.st_uid, owner.st_gid, dir_fd=directory, follow_symlinks=False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener
