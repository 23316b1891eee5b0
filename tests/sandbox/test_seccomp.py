"""The system-call filter: by evaluation for both architectures, and for real on this one."""

from __future__ import annotations

import errno
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.sandbox import seccomp
from claude_wrapper.sandbox.seccomp import ALLOW, ARM64, DENIED, KILL_PROCESS, X86_64, Architecture, Sockets, refuse
from sandbox.bpf import verdict

BOTH = pytest.mark.parametrize("architecture", [X86_64, ARM64], ids=lambda found: found.name)
EPERM = refuse(errno.EPERM)
THREAD = 0x00000100 | 0x00000200 | 0x00000400 | 0x00000800 | 0x00010000  # CLONE_VM FS FILES SIGHAND THREAD


def ask(architecture: Architecture, name: str, *arguments: int, sockets: Sockets = Sockets.LOCAL) -> int:
    program = seccomp.compile_filter(architecture, sockets)
    return verdict(program, arch=architecture.audit, number=architecture.numbers[name], arguments=arguments)


@BOTH
def test_every_listed_call_is_refused(architecture: Architecture) -> None:
    for names in DENIED.values():
        for name in names:
            if name in architecture.numbers:
                assert ask(architecture, name) == EPERM, name


@BOTH
def test_the_calls_that_matter_most_are_on_the_list_of_this_architecture(architecture: Architecture) -> None:
    for name in (
        *("mount", "unshare", "setns", "bpf", "keyctl", "io_uring_setup", "ptrace", "process_vm_readv"),
        *("process_vm_writev", "pidfd_getfd", "open_by_handle_at", "userfaultfd", "perf_event_open", "kexec_load"),
    ):
        assert ask(architecture, name) == EPERM, name


@BOTH
def test_ordinary_threads_and_children_may_be_made_and_namespaces_may_not(architecture: Architecture) -> None:
    assert ask(architecture, "clone", THREAD) == ALLOW
    assert ask(architecture, "clone", 17) == ALLOW  # SIGCHLD: fork
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(architecture, "clone", flag | 17) == EPERM, hex(flag)
    assert ask(architecture, "clone3") == refuse(errno.ENOSYS)


@BOTH
@pytest.mark.parametrize(("sockets", "allowed"), [(Sockets.UNIX_ONLY, {1}), (Sockets.LOCAL, {1, 2, 10, 16})])
def test_only_the_listed_socket_families_can_be_opened(
    architecture: Architecture, sockets: Sockets, allowed: set[int]
) -> None:
    for family in range(64):
        expected = ALLOW if family in allowed else refuse(errno.EAFNOSUPPORT)
        assert ask(architecture, "socket", family, sockets=sockets) == expected, family


@BOTH
def test_typing_into_a_terminal_is_refused_also_with_garbage_in_the_upper_half(architecture: Architecture) -> None:
    assert ask(architecture, "ioctl", 0, 0x5401) == ALLOW  # TCGETS
    for request in (0x5412, 0x541C, 0xDEAD_0000_5412, 0xFFFF_FFFF_0000_541C):
        assert ask(architecture, "ioctl", 0, request) == EPERM


@BOTH
def test_another_instruction_set_is_killed(architecture: Architecture) -> None:
    program = seccomp.compile_filter(architecture, Sockets.LOCAL)
    for audit in (0x40000003, 0x40000028, 0, 0xFFFFFFFF):  # i386, arm, nonsense
        assert verdict(program, arch=audit, number=1) == KILL_PROCESS


def test_the_second_calling_convention_of_x86_64_is_refused() -> None:
    program = seccomp.compile_filter(X86_64, Sockets.LOCAL)
    for number in (0x40000000, 0x40000000 | X86_64.numbers["socket"], 0xFFFFFFFF):
        assert verdict(program, arch=X86_64.audit, number=number) == refuse(errno.ENOSYS)


@BOTH
@given(number=st.integers(0, 600), first=st.integers(0, 2**64 - 1))
def test_a_call_that_is_not_listed_is_allowed_whatever_its_arguments(
    architecture: Architecture, number: int, first: int
) -> None:
    listed = {architecture.numbers[name] for names in DENIED.values() for name in names if name in architecture.numbers}
    ruled = {architecture.numbers[name] for name in ("clone", "clone3", "socket", "ioctl", "personality")}
    program = seccomp.compile_filter(architecture, Sockets.LOCAL)
    if number not in listed | ruled:
        assert verdict(program, arch=architecture.audit, number=number, arguments=(first, first)) == ALLOW


PROBE = textwrap.dedent("""
    import ctypes, errno, sys
    sys.path.insert(0, sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    for item in sys.argv[2:]:
        number, *arguments = map(int, item.split(","))
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in (arguments + [0] * 6)[:6]))
        print(result, errno.errorcode.get(ctypes.get_errno(), "-"))
""")


def calls(*names: tuple[str, tuple[int, ...]]) -> list[str]:
    """Arguments for PROBE: number and arguments of each call on this machine."""
    numbers = seccomp.this_architecture().numbers
    return [",".join(map(str, (numbers[name], *arguments))) for name, arguments in names]


def test_this_machine_has_a_filter() -> None:
    assert seccomp.this_architecture() in [X86_64, ARM64]
    assert len(seccomp.compile_filter(seccomp.this_architecture(), Sockets.LOCAL)) % 8 == 0
    assert sys.byteorder == "little"
