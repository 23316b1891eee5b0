"""What a process in bubblewrap sees, reaches and leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import SlotDirs, directories, processes
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools
from sandbox.doubles import (
    eventually,
    host_cgroups,
    limits,
    one_turn,
    run,
    shell_spec,
    spawn,
    why_no_bwrap,
    why_no_uids,
)
from sandbox.test_seccomp import PROBE, calls

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.skipif(why_no_bwrap() is not None, reason=str(why_no_bwrap())),
]
needs_uids = pytest.mark.skipif(why_no_uids() is not None, reason=str(why_no_uids()))
TENANT, OTHER = 300_001, 300_002
INSIDE_PYTHON = "/usr/bin/python3"


@pytest.fixture
def slots(open_tmp: Path) -> Path:
    return open_tmp / "slots"


@pytest.fixture
def sandbox() -> Iterator[BwrapSandbox]:
    uids = why_no_uids() is None
    made = BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=host_cgroups(), uids=uids, disable_userns=True))
    yield made
    made.close()


@pytest.fixture
def uid() -> int | None:
    return TENANT if why_no_uids() is None else None


@pytest.fixture
def dirs(sandbox: BwrapSandbox, slots: Path, uid: int | None) -> Iterator[SlotDirs]:
    made = sandbox.create_dirs(slots / "slot_one", uid)
    yield made
    sandbox.remove_dirs(made)
    assert not made.root.exists()


@pytest.mark.real_cli
async def test_the_real_cli_answers_a_turn_over_the_unix_socket(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None, open_cli: Path
) -> None:
    result = await one_turn(sandbox, dirs, open_cli, uid=uid)

    assert result["result"] == "pong"
    assert result["is_error"] is False
    assert result["inode"] == open_cli.stat().st_ino  # the very file, so that its pages are shared between slots


async def test_inside_are_constant_paths_a_constant_user_and_no_capabilities(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    script = (
        "id -u; pwd; echo $HOME; touch /work/a $HOME/b /tmp/c && echo ok; grep -E '^(Cap|NoNewPrivs)' /proc/self/status"
    )
    code, out, _ = await run(sandbox, dirs, script, uid=uid)

    lines = out.split("\n")
    assert code == 0
    assert lines[:4] == ["1000", "/work", "/home/agent", "ok"]
    status = dict(line.split(":\t") for line in lines[4:] if line)
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert (dirs.work / "a").exists()
    assert (dirs.home / "b").exists()


async def test_the_servers_files_and_the_hosts_processes_are_not_there(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None, open_tmp: Path
) -> None:
    secret = open_tmp / "server.env"
    secret.write_text("KEY=1")
    secret.chmod(0o644)
    here = Path(__file__)
    script = f"ls -a /; cat {secret} {here} /etc/shadow; ls /root {dirs.root} /home; ls /proc | grep -c '^[0-9]'"
    _, out, err = await run(sandbox, dirs, script, uid=uid)

    assert "KEY" not in out
    assert "anyio" not in out
    assert set(out.split("\n/home:")[0].split()) - {"/home:", "agent"} >= {"usr", "work", "proc"}
    assert not {"root", "srv", "var", "mnt"} & set(out.split())
    for path in (secret, here, dirs.root, "/etc/shadow", "/root"):
        assert f"{path}': No such file" in err or f"{path}: No such file" in err
    assert int(out.split()[-1]) <= 6  # bubblewrap, the shell, ls, grep


async def test_pid_one_inside_does_not_tell_the_hosts_paths(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    _, out, _ = await run(sandbox, dirs, "cat /proc/*/cmdline /proc/*/environ | tr '\\0' ' '", uid=uid)

    assert "bwrap" in out
    assert str(dirs.root) not in out


async def test_the_system_is_read_only(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    targets = "/x /usr/x /etc/passwd /dev/x /run/x /run/broker/x /opt/claude/claude /proc/sys/kernel/hostname"
    script = f"for f in {targets}; do (echo x > $f) 2>/dev/null && echo wrote $f; done; true"
    _, out, _ = await run(sandbox, dirs, script, uid=uid)

    assert out == ""


async def test_kernel_settings_cannot_be_opened_even_by_a_root_servers_own_uid(
    sandbox: BwrapSandbox, slots: Path
) -> None:
    shared = sandbox.create_dirs(slots / "slot_shared", None)
    script = "for f in kernel/core_pattern kernel/hostname vm/swappiness; do (: >> /proc/sys/$f) && echo opened; done"
    _, out, err = await run(sandbox, shared, script)
    sandbox.remove_dirs(shared)

    assert out == ""
    assert err.count("Read-only") == 3


async def test_there_is_no_network_but_the_loopback_of_its_own(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    name = f"\0claude-wrapper-test-{os.getpid()}"
    abstract.bind(name)
    abstract.listen()
    program = f"""
import socket
def attempt(what, *address):
    try:
        with socket.socket(what) as s:
            s.settimeout(2); s.connect(*address); print("reached", address)
    except OSError as error:
        print("refused", error.strerror)
attempt(socket.AF_INET, ("127.0.0.1", {listener.getsockname()[1]}))
attempt(socket.AF_INET, ("169.254.169.254", 80))
attempt(socket.AF_UNIX, "\\0" + {name[1:]!r})
attempt(40, (2, 1))
"""
    (dirs.work / "reach.py").write_text(program)
    _, out, err = await run(sandbox, dirs, f"{INSIDE_PYTHON} /work/reach.py", uid=uid)
    listener.close()
    abstract.close()

    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["refused"] * 4


async def test_dangerous_calls_are_refused_for_real(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    (dirs.work / "probe.py").write_text(PROBE)
    (dirs.work / "probe.py").chmod(0o644)
    asked = calls(
        ("unshare", (0x10000000,)),
        ("io_uring_setup", (1,)),
        ("bpf", ()),
        ("keyctl", ()),
        ("ptrace", ()),
        ("process_vm_readv", ()),
        ("mount", ()),
        ("pidfd_getfd", ()),
        ("socket", (40, 1)),
        ("clone3", ()),
    )
    _, out, err = await run(sandbox, dirs, f"{INSIDE_PYTHON} /work/probe.py . {' '.join(asked)}", uid=uid)

    assert err == ""
    assert out.split("\n")[:-1] == ["-1 EPERM"] * 8 + ["-1 EAFNOSUPPORT", "-1 ENOSYS"]


async def test_temporary_directories_have_a_size(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    small = limits(tmp_bytes=2 << 20, shm_bytes=1 << 20, file_bytes=8 << 20)
    script = "for d in /tmp /dev/shm; do head -c 6000000 /dev/zero > $d/f; stat -c %s $d/f; done"
    _, out, err = await run(sandbox, dirs, script, uid=uid, limits=small)

    assert out.split() == [str(2 << 20), str(1 << 20)]
    assert err.count("No space left") == 2


async def test_a_file_has_a_size(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    await run(sandbox, dirs, "head -c 9000000 /dev/zero > /work/f", uid=uid, limits=limits(file_bytes=1 << 20))

    assert (dirs.work / "f").stat().st_size == 1 << 20


async def test_a_fork_bomb_is_bounded_and_others_can_start(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None, slots: Path
) -> None:
    other = sandbox.create_dirs(slots / "slot_two", OTHER if uid else None)
    # Python, because a shell that cannot fork gives up.
    (dirs.work / "bomb.py").write_text("""
import os, time
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError:
        pass
print("go", flush=True)
time.sleep(60)
""")
    script = f"{INSIDE_PYTHON} /work/bomb.py"
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script, uid=uid, limits=limits(processes=40))))
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"go\n"
        assert len(processes.descendants(process.pid)) >= 35
        code, out, _ = await run(sandbox, other, "echo alive", uid=OTHER if uid else None)
        assert len(processes.descendants(process.pid)) <= 41
    await sandbox.kill(process.pid, dirs)
    await process.wait()

    assert (code, out) == (0, "alive\n")
    sandbox.remove_dirs(other)


async def test_a_memory_bomb_is_ended_and_its_starter_lives(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    if "memory" not in host_cgroups().controllers:
        pytest.skip("no writable control group for memory on this host")
    script = f"{INSIDE_PYTHON} -c 'x = bytearray(600 << 20); print(len(x))'; echo ended $?"
    _, out, _ = await run(sandbox, dirs, script, uid=uid, limits=limits(memory_bytes=200 << 20))

    assert out == "ended 137\n"


async def test_kill_leaves_nothing_that_it_started(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    script = "setsid sleep 300 & (setsid sh -c 'sleep 300 & sleep 300' &) ; echo up; sleep 300"
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script, uid=uid)))
    assert process.stdout is not None
    async with asyncio.timeout(10):
        await process.stdout.readline()
        await eventually(lambda: len(processes.descendants(process.pid)) >= 6)
    started = [found.pid for found in processes.descendants(process.pid)]

    await sandbox.kill(process.pid, dirs)
    await process.wait()

    assert [pid for pid in started if (found := processes.read_process(pid)) and found.alive] == []


async def test_kill_after_the_end_is_harmless(sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None) -> None:
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, "exit 3", uid=uid)))
    async with asyncio.timeout(10):
        assert await process.wait() == 3

    await sandbox.kill(process.pid, dirs)
    await sandbox.kill(2**22 - 1, dirs)


async def test_the_end_of_the_cli_ends_what_it_left_running(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    process = await spawn(
        sandbox.prepare(shell_spec(sandbox, dirs, "setsid sleep 300 >/dev/null 2>&1 & echo up; exit 0", uid=uid))
    )
    async with asyncio.timeout(10):
        await process.communicate()
        home = dirs.home.stat()
        key = (home.st_dev, home.st_ino)
        await eventually(lambda: not any(processes.sees(p.pid, "/home/agent", key) for p in processes.all_processes()))


SERVER = """
import asyncio, sys
from pathlib import Path
from sandbox.doubles import host_cgroups, shell_spec, spawn
from claude_wrapper.sandbox import SlotDirs
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools

async def main():
    uid = int(sys.argv[2]) or None
    sandbox = BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=None, uids=uid is not None, disable_userns=True))
    dirs = sandbox.create_dirs(Path(sys.argv[1]), uid)
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, "setsid sleep 300 & echo up; sleep 300", uid=uid)))
    await process.stdout.readline()
    print(sandbox.main_pid(process.pid), flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


async def test_sigkill_of_the_server_leaves_nothing_running(
    sandbox: BwrapSandbox, slots: Path, uid: int | None
) -> None:
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, str(slots / "slot_dies"), str(uid or 0)),
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": "/usr/bin:/bin"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    async with asyncio.timeout(20):
        assert int(await server.stdout.readline()) > 0
        started = [found.pid for found in processes.descendants(server.pid)]
        assert len(started) >= 4
        server.send_signal(signal.SIGKILL)
        await server.wait()
        for pid in started:
            assert await processes.gone(pid, 10)
    root = slots / "slot_dies"
    sandbox.remove_dirs(SlotDirs(root=root, home=root / "home", work=root / "work", run=root / "run"))


@needs_uids
async def test_two_slots_cannot_read_each_others_directories(
    sandbox: BwrapSandbox, dirs: SlotDirs, slots: Path
) -> None:
    other = sandbox.create_dirs(slots / "slot_two", OTHER)
    (other.work / "secret").write_text("SECRET")
    os.chown(other.work / "secret", OTHER, OTHER)
    (other.work / "secret").chmod(0o644)
    script = f"cat {other.work}/secret; ls {slots}"
    _, inside, _ = await run(sandbox, dirs, script, uid=TENANT)
    # Also without the namespaces: ordinary permissions hold by themselves.
    plain = await asyncio.create_subprocess_exec(
        *(
            "setpriv",
            f"--reuid={TENANT}",
            f"--regid={TENANT}",
            "--clear-groups",
            "sh",
            "-c",
            script + f"; ls {dirs.work}",
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await plain.communicate()

    assert inside == ""
    assert out == b""
    assert err.count(b"Permission denied") == 2  # and its own workspace is open to it
    sandbox.remove_dirs(other)


@needs_uids
async def test_a_directory_that_is_closed_to_the_uid_is_named(sandbox: BwrapSandbox, open_tmp: Path) -> None:
    closed = open_tmp / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(SandboxUnavailable, match=str(closed)):
        sandbox.create_dirs(closed / "slot", TENANT)

    assert list(closed.iterdir()) == []


@needs_uids
async def test_a_uid_that_cannot_be_taken_is_refused_not_ignored(dirs: SlotDirs) -> None:
    weaker = BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=None, uids=False, disable_userns=True))

    with pytest.raises(SandboxUnavailable, match="CAP_SETUID"):
        weaker.prepare(shell_spec(weaker, dirs, "true", uid=TENANT))


async def test_the_main_pid_is_the_clis_own_even_among_orphans(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    script = "(setsid sleep 300 &); (setsid sleep 300 &); echo up; read x"
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script, uid=uid)))
    assert process.stdout is not None
    try:
        async with asyncio.timeout(10):
            await process.stdout.readline()
        main = sandbox.main_pid(process.pid)
        assert processes.namespace_pids(main)[-1] == 2
        assert b"read x" in Path(f"/proc/{main}/cmdline").read_bytes()
    finally:
        await sandbox.kill(process.pid, dirs)
        await process.wait()


@pytest.mark.parametrize("grouped", [True, False], ids=["control groups", "signals"])
async def test_a_frozen_tree_uses_no_cpu_and_can_be_killed_or_thawed(
    dirs: SlotDirs, uid: int | None, *, grouped: bool
) -> None:
    tree = host_cgroups() if grouped else None
    sandbox = BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=tree, uids=uid is not None, disable_userns=True))
    process = await spawn(
        sandbox.prepare(shell_spec(sandbox, dirs, "(while :; do :; done) & read x; echo got $x; kill $!", uid=uid))
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(20):
            await eventually(lambda: len(processes.descendants(process.pid)) >= 3)
            sandbox.freeze(process.pid, dirs)
            busy = processes.descendants(process.pid)[-1].pid
            await eventually(lambda: cpu_ticks(busy) == cpu_ticks(busy, after=0.05))
            sandbox.thaw(process.pid, dirs)
            process.stdin.write(b"it\n")
            assert await process.stdout.readline() == b"got it\n"
            sandbox.freeze(process.pid, dirs)
            await sandbox.kill(process.pid, dirs)
    finally:
        await sandbox.kill(process.pid, dirs)
        await process.wait()
        sandbox.close()


def cpu_ticks(pid: int, after: float = 0.0) -> int:
    with contextlib.suppress(TimeoutError, ImportError):
        signal.sigtimedwait([], after)  # a pause that is not a sleep of the loop
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_nothing_of_a_launch_stays_open_in_the_server(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    launch = sandbox.prepare(shell_spec(sandbox, dirs, "true", uid=uid))
    assert len(launch.pass_fds) > 0
    launch.close_fds()
    launch.close_fds()

    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        sandbox.prepare(shell_spec(sandbox, dirs, "true", uid=uid, cli=Path("/no/such/cli")))
    assert set(os.listdir("/proc/self/fd")) == before


async def test_what_is_shown_in_addition_is_read_only(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None, open_tmp: Path
) -> None:
    shown = open_tmp / "shown"
    shown.mkdir(mode=0o755)
    (shown / "f").write_text("hello")
    binds = ((shown, Path("/etc/shown")),)
    _, out, err = await run(sandbox, dirs, "cat /etc/shown/f; echo x > /etc/shown/f", uid=uid, read_only_binds=binds)

    assert out == "hello"
    assert "Read-only" in err


@needs_uids
def test_reaching_a_directory_is_judged_by_every_directory_above(open_tmp: Path) -> None:
    inner = open_tmp / "a" / "b"
    inner.mkdir(parents=True)
    (open_tmp / "a").chmod(0o750)

    assert directories.unreachable(inner, TENANT) == open_tmp / "a"
    os.chown(open_tmp / "a", -1, TENANT)
    assert directories.unreachable(inner, TENANT) is None
