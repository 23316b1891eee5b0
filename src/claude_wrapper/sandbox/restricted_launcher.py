"""Confine this very process and become the CLI. Run by `restricted.py` as `python -I -S this-file FD`.

Stands alone: imports only the standard library, because it runs in an interpreter without site-packages and because
every import costs start-up time. The descriptor holds the marshalled plan that `restricted.plan_of` describes; both
ends are the same interpreter. Exit status 125 and one line on stderr mean that a wall could not be put up; the CLI is
never started without all of them.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 1, 38, 22, 24, 47
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
_FAILED = 125

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = _libc.prctl(ctypes.c_int(option), *padded)
    return result


def _syscall(number: int, *arguments: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def _join(procs: list[str]) -> None:
    for path in procs:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(descriptor, b"0")  # 0: whoever writes
        os.close(descriptor)


def _ruleset(plan: dict[str, Any]) -> int:
    """A Landlock ruleset; made before the uid changes, because the new one may not reach every parent directory."""
    rights: int = plan["rights"]
    attributes = struct.pack("=QQQ", rights, plan["network"], plan["scopes"])
    size = 24 if plan["scopes"] else 16 if plan["network"] else 8
    ruleset = _check(_syscall(444, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for path, allowed in plan["rules"]:
        try:
            beneath = os.open(path.replace("{pid}", str(os.getpid())), os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = struct.pack("=Qi", allowed & rights, beneath)
        _check(_syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(beneath)
    return ruleset


def _drop_privileges(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        for capability in range(_LAST_CAPABILITY + 1):
            _prctl(_PR_CAPBSET_DROP, capability)  # fails for numbers that the kernel does not know
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(_PR_CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, b"\0" * 24), "capset")
    if uid is not None and os.getresuid() != (uid, uid, uid):
        raise OSError(0, f"could not become uid {uid}")


def _die_with(parent: int) -> None:
    # After the uid change, which clears it.
    _check(_prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        raise OSError(0, "the server is gone")


def _filter(program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    result: int = _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _check(result, "seccomp filter")


def main() -> None:
    """Put up the walls in the only order that works, then exec."""
    descriptor = int(sys.argv[1])
    with os.fdopen(descriptor, "rb") as file:
        plan = marshal.loads(file.read())  # noqa: S302 - the server's own memory file, not input
    _join(plan["procs"])
    ruleset = _ruleset(plan) if plan["rules"] else None
    os.chdir(plan["cwd"])
    for number, value in plan["limits"]:
        resource.setrlimit(number, (value, value))
    _drop_privileges(plan["uid"])
    _die_with(plan["parent"])
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "PR_SET_NO_NEW_PRIVS")
    if ruleset is not None:
        _check(_syscall(446, ruleset, 0), "landlock_restrict_self")
        os.close(ruleset)
    _filter(plan["filter"])
    os.closerange(3, 4096)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that would be inherited
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execve(plan["argv"][0], plan["argv"], plan["env"])  # noqa: S606 - this is what it is for


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.stderr.write(f"sandbox: {error.strerror or error}\n")
        os._exit(_FAILED)
