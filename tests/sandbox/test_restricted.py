"""What a process behind Landlock and the filter sees, reaches and leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import Level, SlotDirs, landlock, processes
from claude_wrapper.sandbox.restricted import RestrictedHost, RestrictedSandbox
from sandbox.doubles import SHELL, host_cgroups, limits, one_turn, run, shell_spec, spawn, why_no_uids
from sandbox.test_seccomp import PROBE, calls

ABI = landlock.abi()
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock"),
]
needs_uids = pytest.mark.skipif(why_no_uids() is not None, reason=str(why_no_uids()))
TENANT, OTHER = 300_003, 300_004
PYTHON = "/usr/bin/python3"
OWN_UID = pytest.param(TENANT, id="own uid", marks=needs_uids)
BOTH = pytest.mark.parametrize("uid", [OWN_UID, pytest.param(None, id="the server's uid")])


@pytest.fixture
def sandbox() -> Iterator[RestrictedSandbox]:
    made = RestrictedSandbox(RestrictedHost(ABI, host_cgroups(), uids=why_no_uids() is None))
    yield made
    made.close()


@pytest.fixture
def uid() -> int | None:
    return TENANT if why_no_uids() is None else None


@pytest.fixture
def dirs(sandbox: RestrictedSandbox, open_tmp: Path, uid: int | None) -> Iterator[SlotDirs]:
    made = sandbox.create_dirs(open_tmp / "slots" / "slot_one", uid)
    yield made
    sandbox.remove_dirs(made)
    assert not made.root.exists()


@pytest.mark.real_cli
@BOTH
async def test_the_real_cli_answers_a_turn(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None, open_cli: Path
) -> None:
    assert (await one_turn(sandbox, dirs, open_cli, uid=uid))["result"] == "pong"


@BOTH
async def test_only_its_own_files_can_be_read_and_written(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None, open_tmp: Path
) -> None:
    secret = open_tmp / "server.env"
    secret.write_text("KEY=1")
    secret.chmod(0o644)
    other = sandbox.create_dirs(open_tmp / "slots" / "slot_two", OTHER if uid else None)
    script = f"""cd; echo mine > $HOME/a; echo mine > {dirs.work}/a; cat {dirs.work}/a; mktemp >/dev/null && echo temporary
    cat {secret} {__file__} /etc/shadow /proc/{os.getpid()}/environ; ls {open_tmp}/slots {other.work} /proc /tmp / /root
    for f in /tmp/x /dev/shm/x {other.work}/x {dirs.root}/x {dirs.run}/x; do (echo x > $f) && echo wrote $f; done; ps -e"""
    _, out, err = await run(sandbox, dirs, script, uid=uid)
    sandbox.remove_dirs(other)

    assert out == "mine\ntemporary\n"
    assert "KEY" not in err


@BOTH
async def test_only_unix_sockets_can_be_made_and_no_abstract_one_of_others_reached(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    abstract = socket.socket(socket.AF_UNIX)
    name = f"\0claude-wrapper-restricted-{os.getpid()}"
    abstract.bind(name)
    abstract.listen()
    program = f"""
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 40):
    try:
        socket.socket(family, socket.SOCK_DGRAM); print("made", family)
    except OSError as error:
        print("refused")
try:
    socket.socket(socket.AF_UNIX).connect({name!r}); print("reached")
except OSError as error:
    print("refused")
"""
    (dirs.work / "reach.py").write_text(program)
    (dirs.work / "reach.py").chmod(0o644)
    _, out, err = await run(sandbox, dirs, f"{PYTHON} {dirs.work}/reach.py", uid=uid)
    abstract.close()

    assert err == ""
    assert out.split() == ["refused"] * (6 if ABI >= 6 else 5) + ([] if ABI >= 6 else ["reached"])


@BOTH
async def test_dangerous_calls_are_refused_for_real(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    (dirs.work / "probe.py").write_text(PROBE)
    (dirs.work / "probe.py").chmod(0o644)
    asked = calls(
        *(("unshare", (0x10000000,)), ("io_uring_setup", (1,)), ("bpf", ()), ("keyctl", ()), ("ptrace", ())),
        *(("process_vm_readv", ()), ("mount", ()), ("pidfd_getfd", ()), ("socket", (40, 1))),
    )
    script = f"{PYTHON} {dirs.work}/probe.py . {' '.join(asked)}; grep -E '^(Cap|NoNew)' /proc/$$/status"
    _, out, err = await run(sandbox, dirs, script, uid=uid)

    lines = out.split("\n")
    assert err == ""
    assert lines[:9] == ["-1 EPERM"] * 8 + ["-1 EAFNOSUPPORT"]
    assert {line.split()[1] for line in lines[9:] if line.startswith(("CapPrm", "CapEff", "CapAmb"))} == {"0" * 16}
    assert "NoNewPrivs:\t1" in lines


@BOTH
async def test_the_server_cannot_be_signalled(sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None) -> None:
    if ABI < 6 and uid is None:
        pytest.skip("Landlock confines signals from ABI 6 on")
    code, _, err = await run(sandbox, dirs, f"kill -0 {os.getpid()}", uid=uid)

    assert code == 1
    assert "not permitted" in err


async def test_kill_ends_children_that_left_the_session(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    script = (
        "(cd /usr; env -i setsid sleep 300 >/dev/null 2>&1 &); setsid sh -c 'sleep 300 & sleep 300' & echo up; wait"
    )
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script, uid=uid)))
    assert process.stdout is not None
    async with asyncio.timeout(10):
        await process.stdout.readline()

    await sandbox.kill(process.pid, dirs)
    await process.wait()

    if uid is not None:
        left = [p.pid for p in processes.all_processes() if p.alive and processes.real_uid(p.pid) == uid]
        assert left == []
    assert host_cgroups().pids("slot_one") == []


async def test_limits_of_files_hold(sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None) -> None:
    small = limits(file_bytes=1 << 20, open_files=64)
    _, out, _ = await run(
        sandbox, dirs, "ulimit -n; head -c 9000000 /dev/zero > f; stat -c %s f", uid=uid, limits=small
    )

    assert out.split() == ["64", str(1 << 20)]


async def test_a_wall_that_cannot_be_put_up_stops_the_start(
    sandbox: RestrictedSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    launch = sandbox.prepare(shell_spec(sandbox, dirs, "echo started", uid=uid))
    launch.env = {}
    for group in host_cgroups().groups("slot_one"):
        group.rmdir()
    if not host_cgroups().parents:
        launch.close_fds()
        pytest.skip("no control group on this host that could be taken away")
    process = await spawn(launch)
    async with asyncio.timeout(10):
        out, err = await process.communicate()

    assert (process.returncode, out) == (125, b"")
    assert b"sandbox: " in err


def test_without_landlock_and_uids_nothing_would_keep_slots_apart() -> None:
    with pytest.raises(SandboxUnavailable, match="nothing would keep"):
        RestrictedSandbox(RestrictedHost(landlock_abi=0, cgroups=None, uids=False))


async def test_without_landlock_every_slot_needs_a_uid(dirs: SlotDirs) -> None:
    weaker = RestrictedSandbox(RestrictedHost(landlock_abi=0, cgroups=None, uids=True))

    with pytest.raises(SandboxUnavailable, match="uid of its own"):
        weaker.prepare(shell_spec(weaker, dirs, "true", uid=None))


async def test_paths_are_the_hosts_and_the_level_says_its_name(sandbox: RestrictedSandbox, dirs: SlotDirs) -> None:
    layout = sandbox.layout(dirs, SHELL)

    assert layout.socket is not None
    assert Path(layout.socket) == dirs.run / "api.sock"
    assert sandbox.level is Level.RESTRICTED
    assert stat.S_IMODE((dirs.root / "tmp").stat().st_mode) == 0o700
