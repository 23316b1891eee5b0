"""Landlock: which access rights a kernel knows, and whether it has it at all.

Facts from linux/landlock.h and Documentation/userspace-api/landlock.rst: ABI 2 adds REFER, 3 TRUNCATE, 4 TCP, 5 device
ioctls, 6 scopes (abstract unix sockets, signals). Path-named unix sockets are not restricted by any of them.
"""

from __future__ import annotations

from claude_wrapper.sandbox import syscalls

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_ABI_1 = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ = _READ_FILE | _READ_DIR
READ_EXECUTE = READ | _EXECUTE
DEVICE = _READ_FILE | _WRITE_FILE | _IOCTL_DEV
EVERYTHING = _ABI_1 | _REFER | _TRUNCATE | _IOCTL_DEV
FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""Rights that mean something for a file; a rule on a file may hold no other."""


def abi() -> int:
    """The kernel's Landlock ABI; 0: none (too old, not configured, switched off, or hidden by gVisor)."""
    try:
        return syscalls.call(CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def known_rights(version: int) -> int:
    """The file system rights that this ABI can handle."""
    rights = _ABI_1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if version >= since:
            rights |= right
    return rights


def network_rights(version: int) -> int:
    """TCP bind and connect, where the ABI has them."""
    return 3 if version >= 4 else 0


def scopes(version: int) -> int:
    """Abstract unix sockets and signals, where the ABI has them."""
    return 3 if version >= 6 else 0
