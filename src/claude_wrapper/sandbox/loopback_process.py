"""Make a listening socket in another process's network and hand it over. Run by `loopback.py`, outside of the sandbox.

Arguments: pid, port, descriptor of a socket to send it through, uid to become first (0: stay). Stands alone, like
`restricted_launcher.py`. Becomes the owner of the sandbox's user namespace, enters that, then the network it owns:
`setns` to a network needs CAP_SYS_ADMIN in both, which the owner has there and an ordinary server nowhere else.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_GET_OWNER = 0xB701  # NS_GET_USERNS of linux/nsfs.h


def main() -> None:
    """Raises OSError when a step is refused."""
    pid, port, channel, uid = (int(argument) for argument in sys.argv[1:5])
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int, kind: int) -> None:
        if libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {os.strerror(code)}")

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    enter(fcntl.ioctl(network, _GET_OWNER), _NEW_USER)
    enter(network, _NEW_NETWORK)
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener, socket.socket(fileno=channel) as out:
        socket.send_fds(out, [b"."], [listener.fileno()])


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        os._exit(1)
