"""The system-call filter, compiled to classic BPF from a readable list.

Default: allow. What is denied is what an agent never needs and what reaches the kernel in ways that the other walls do
not cover: mounting and new namespaces, other processes' memory, keyrings, bpf, io_uring (which can make sockets behind
a filter's back), every socket family but those listed (**AF_VSOCK is not confined by a network namespace**).

The filter is pure data: `compile_filter` gives the bytes of `struct sock_filter[]`, which bubblewrap reads from a
descriptor (`--seccomp FD`) and the restricted launcher installs itself. A process of another instruction set (32-bit
code on a 64-bit kernel) is killed at its first system call, because its numbers mean other calls.
"""

from __future__ import annotations

import enum
import errno
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import syscalls


@dataclass(frozen=True, slots=True)
class Architecture:
    """One instruction set that a filter can be compiled for."""

    name: str
    audit: int
    """AUDIT_ARCH_* of linux/audit.h: what `seccomp_data.arch` holds."""
    numbers: dict[str, int]
    x32: bool
    """Whether numbers with bit 30 set are a second calling convention (x86-64's x32)."""


X86_64 = Architecture("x86_64", 0xC000003E, syscalls.X86_64, x32=True)
ARM64 = Architecture("aarch64", 0xC00000B7, syscalls.ARM64, x32=False)

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16


class Sockets(enum.Enum):
    """Which socket families a process may open."""

    UNIX_ONLY = (AF_UNIX,)
    """No network namespace stands behind the filter: nothing but the broker's socket."""
    LOCAL = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
    """Inside an own network namespace, where INET reaches a loopback of the sandbox's own at most."""


DENIED: dict[str, tuple[str, ...]] = {
    "mounts": (
        *("mount", "umount2", "pivot_root", "chroot", "fsopen", "fsconfig", "fsmount", "fspick", "open_tree"),
        *("open_tree_attr", "move_mount", "mount_setattr"),
    ),
    "namespaces": ("unshare", "setns"),
    "other processes": (
        *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"),
    ),
    "kernel keyrings": ("add_key", "request_key", "keyctl"),
    "programs in the kernel": ("bpf", "perf_event_open", "userfaultfd"),
    "calls behind the filter's back": ("io_uring_setup", "io_uring_enter", "io_uring_register"),
    "files by handle": ("open_by_handle_at", "name_to_handle_at", "fanotify_init", "lookup_dcookie"),
    "kernel code": (
        *("kexec_load", "kexec_file_load", "create_module", "init_module", "finit_module", "delete_module"),
    ),
    "the machine": (
        *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog", "settimeofday", "clock_settime"),
        *("clock_adjtime", "sethostname", "setdomainname", "vhangup", "nfsservctl", "uselib"),
    ),
    "processor state": ("iopl", "ioperm", "modify_ldt"),
}
"""Why (for the documentation) → the calls answered with EPERM, whatever their arguments."""

_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_TERMINAL_INJECTION = (0x5412, 0x541C)
"""ioctl TIOCSTI and TIOCLINUX: type into the terminal of whoever started the server."""
_PERSONALITY_QUERY = 0xFFFFFFFF
_X32_BIT = 0x40000000

# BPF opcodes (linux/bpf_common.h) and verdicts (linux/seccomp.h)
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

# Offsets in struct seccomp_data; arguments are 64 bits, little-endian on both architectures.
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24

Instruction = tuple[int, int, int, int]
"""(code, jump if true, jump if false, constant) of struct sock_filter."""


def refuse(code: int) -> int:
    """The verdict that makes the call fail with this errno."""
    return _ERRNO | code


def _when(test: int, constant: int, verdict: int) -> list[Instruction]:
    """If the accumulator passes the test, end with the verdict; else fall through."""
    return [(test, 0, 1, constant), (_RETURN, 0, 0, verdict)]


def _argument_rules(numbers: dict[str, int], sockets: Sockets) -> Iterator[tuple[int, list[Instruction]]]:
    """(call, what to do with it); each block ends in a verdict."""
    allow: list[Instruction] = [(_RETURN, 0, 0, ALLOW)]
    refused = refuse(errno.EPERM)
    yield numbers["clone"], [(_LOAD, 0, 0, _ARGUMENT_0), *_when(_ANY_BIT, _NEW_NAMESPACES, refused), *allow]
    # clone3 hides its flags behind a pointer; with ENOSYS the C library falls back to clone.
    yield numbers["clone3"], [(_RETURN, 0, 0, refuse(errno.ENOSYS))]
    families: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENT_0)]
    for family in sockets.value:
        families += _when(_EQUAL, family, ALLOW)
    yield numbers["socket"], [*families, (_RETURN, 0, 0, refuse(errno.EAFNOSUPPORT))]
    requests: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENT_1)]
    for request in _TERMINAL_INJECTION:
        requests += _when(_EQUAL, request, refused)
    yield numbers["ioctl"], [*requests, *allow]
    persona: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENT_0)]
    for value in (0, _PERSONALITY_QUERY):
        persona += _when(_EQUAL, value, ALLOW)
    yield numbers["personality"], [*persona, (_RETURN, 0, 0, refused)]


def instructions(architecture: Architecture, sockets: Sockets) -> list[Instruction]:
    """The filter as readable instructions."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if architecture.x32:
        program += _when(_AT_LEAST, _X32_BIT, refuse(errno.ENOSYS))
    for number, block in _argument_rules(architecture.numbers, sockets):
        program += [(_EQUAL, 0, len(block), number), *block]
    for names in DENIED.values():
        for name in names:
            if name in architecture.numbers:
                program += _when(_EQUAL, architecture.numbers[name], refuse(errno.EPERM))
    program.append((_RETURN, 0, 0, ALLOW))
    return program


def compile_filter(architecture: Architecture, sockets: Sockets) -> bytes:
    """The filter as `struct sock_filter[]` in the machine's (little-endian) byte order."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions(architecture, sockets))


def this_architecture() -> Architecture:
    """The machine's own. Raises SandboxUnavailable for one whose numbers are not known here."""
    machine = platform.machine()
    for architecture in (X86_64, ARM64):
        if machine in {architecture.name, {"x86_64": "amd64", "aarch64": "arm64"}[architecture.name]}:
            return architecture
    raise SandboxUnavailable(f"no system-call filter for {machine}: only x86_64 and aarch64 are supported")
