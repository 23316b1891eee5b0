"""The attacks: what each tries, and which levels promise that it fails.

An attack is a Python program that runs inside the sandbox as a child of what stands in for the CLI. It calls
`breach(what)` for every success; ending without one means that the wall held. `T` holds the targets (`scenery.targets`).
Nothing but this host's loopback and files of the runner is ever touched.
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = '''
import ctypes, errno, json, os, resource, signal, socket, sys, time
T = json.load(open("attack.json"))
libc = ctypes.CDLL(None, use_errno=True)
CLI = T.get("cli_pid") or os.getppid()
def breach(what): print("BREACH", what, flush=True)
def read(path, size=1 << 20):
    try:
        with open(path, "rb") as file: return file.read(size)
    except OSError: return b""
def steal(path, secret):
    if secret.encode() in read(path): breach("read " + path)
def write(path):
    try:
        with open(path, "ab") as file: file.write(b"")
        breach("may write " + path)
    except OSError: pass
def entries(path):
    try: return os.listdir(path)
    except OSError: return []
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[a if isinstance(a, (bytes, ctypes.Array)) else ctypes.c_long(a) for a in arguments], *[ctypes.c_long(0)] * (6 - len(arguments)))
    return result, ctypes.get_errno()
def reachable(number, *arguments):
    """A call that the filter lets through fails for another reason than EPERM, or works."""
    result, code = call(T["numbers"][number], *arguments)
    if result >= 0 or code not in (errno.EPERM, errno.ENOSYS, errno.EACCES): breach(f"{number} reaches the kernel ({errno.errorcode.get(code, result)})")
def connect(family, kind, address, what):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(2); s.connect(address); s.sendall(b"x")
            if what: breach(what)
    except OSError: pass
'''
"""What every attack can use."""

FILTERED = ("bwrap", "restricted")
"""Every real sandbox holds this by its filter or its walls."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One thing that a hostile agent may try."""

    name: str
    program: str
    holds: tuple[str, ...] = FILTERED
    """Where a success breaks a promise: facts joined by `+`, any one of which is enough. Facts are the level, `uid`
    (own uid) and names of the probe's findings (`cgroup_memory`, …)."""
    why_not: str = ""
    """Why the other levels do not promise it."""
    needs_cli: bool = False
    """Needs the real CLI with its broker."""
    bomb: bool = False
    """Uses up something that neighbours need too: their latency is measured meanwhile."""


ATTACKS: tuple[Attack, ...] = (
    Attack(
        "read another tenant's files",
        'for p in T["other_files"]: steal(p, T["other_secret"])\n'
        'for e in ("root/work/secret", "root/home/agent/.claude/secret", "cwd/secret"): steal("/proc/%d/%s" % (T["other_pid"], e), T["other_secret"])',
    ),
    Attack("list tenants", 'for n in entries(T["slots"]): breach("sees " + n)'),
    Attack(
        "write into another tenant's directories",
        'for p in T["other_files"]: write(p); write(os.path.dirname(p) + "/new")',
    ),
    Attack(
        "read the server's files",
        'for p in T["server_files"]: steal(p, T["server_secret"])\n'
        'for e in ("cwd/server.env", "root" + T["server_files"][0]): steal("/proc/%d/%s" % (T["server_pid"], e), T["server_secret"])',
    ),
    Attack(
        "read the environment and memory of others",
        'for pid in entries("/proc"):\n'
        "    if pid.isdigit():\n"
        '        steal(f"/proc/{pid}/environ", T["server_secret"]); steal(f"/proc/{pid}/environ", T["other_secret"])\n'
        'for pid in (T["server_pid"], T["other_pid"]):\n'
        '    try: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)); breach(f"opened the memory of {pid}")\n'
        "    except OSError: pass",
    ),
    Attack(
        "see others' command lines",
        'for p in entries("/proc"):\n    if T["marker"].encode() in read(f"/proc/{p}/cmdline"): breach("sees " + p)',
    ),
    Attack(
        "signal others",
        'for pid in (T["server_pid"], T["other_pid"]):\n'
        '    try: os.kill(pid, 0); breach(f"may signal {pid}")\n'
        "    except OSError: pass",
    ),
    Attack(
        "find the real credential",
        'places = [*os.environ.values(), *(read(f"/proc/{p}/environ").decode(errors="replace") for p in entries("/proc"))]\n'
        "for d, _, names in os.walk(os.environ['HOME']): places += [read(os.path.join(d, n)).decode(errors='replace') for n in names]\n"
        'if any(T["credential"] in text for text in places): breach("found it")',
    ),
    Attack(
        "write to the system",
        'for p in ("/etc/passwd", "/usr/bin/attack", "/opt/claude/claude", "/root/attack", "/var/attack", T["cli"]): write(p)',
    ),
    Attack(
        "write kernel settings",
        'for p in ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/mm/transparent_hugepage/enabled"): write(p)',
    ),
    Attack(
        "leave files where others look",
        'for d in ("/tmp", "/var/tmp", "/dev/shm", "/run"):\n    try: open(d + "/" + T["marker"], "w").close()\n    except OSError: pass',
    ),
    Attack(
        "reach others' files by links",
        'for i, p in enumerate([*T["other_files"], *T["server_files"]]):\n'
        "    for make in (os.link, os.symlink):\n"
        '        try: make(p, f"link{i}{make.__name__}")\n'
        "        except OSError: continue\n"
        '        steal(f"link{i}{make.__name__}", T["other_secret"]); steal(f"link{i}{make.__name__}", T["server_secret"])\n'
        '        if make is os.link: breach("hard-linked " + p)',
    ),
    Attack(
        "reach a service on the host's loopback",
        'connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", T["tcp"]), "TCP"); connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", T["udp"]), None)',
    ),
    Attack(
        "have a route to the metadata address",
        "try:\n"
        '    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(("169.254.169.254", 80)); breach(s.getsockname()[0])\n'
        "except OSError: pass",
    ),
    Attack(
        "connect to a unix socket that is open to all",
        'connect(socket.AF_UNIX, socket.SOCK_STREAM, T["open_socket"], "connected")',
        ("bwrap",),
        "Landlock does not confine sockets that have a path",
    ),
    Attack(
        "connect to another tenant's broker socket",
        'connect(socket.AF_UNIX, socket.SOCK_STREAM, T["other_socket"], "connected")',
        ("bwrap", "restricted+uid"),
        "a shared uid may connect by path",
    ),
    Attack(
        "connect to an abstract unix socket",
        'connect(socket.AF_UNIX, socket.SOCK_STREAM, "\\0" + T["abstract"], "connected")',
    ),
    Attack(
        "open raw, packet, vsock and other sockets",
        "for family, kind, what in ((socket.AF_INET, socket.SOCK_RAW, 'raw'), (socket.AF_PACKET, socket.SOCK_RAW, 'packet'), (40, socket.SOCK_STREAM, 'vsock'), (38, 5, 'alg'), (16, 3, 'netlink-uevent')):\n"
        "    try:\n"
        "        socket.socket(family, kind, 1 if what in ('raw',) else 0)\n"
        "        if what != 'netlink-uevent': breach(what)\n"
        "    except OSError: pass",
    ),
    Attack(
        "make or enter namespaces",
        "for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):\n"
        '    if call(T["numbers"]["unshare"], flag)[0] == 0: breach(f"unshare {flag:#x}")\n'
        'for pid in (T["server_pid"], T["other_pid"], 1):\n'
        '    for ns in ("mnt", "net", "pid"):\n'
        '        try: fd = os.open(f"/proc/{pid}/ns/{ns}", os.O_RDONLY)\n'
        "        except OSError: continue\n"
        '        if call(T["numbers"]["setns"], fd, 0)[0] == 0 and pid != 1: breach(f"entered {ns} of {pid}")',
    ),
    Attack(
        "have or get privileges",
        'status = dict(l.split(":\\t", 1) for l in read(f"/proc/{CLI}/status").decode().splitlines() if ":\\t" in l)\n'
        'if int(status.get("CapEff", "0"), 16): breach("capabilities " + status["CapEff"])\n'
        "try: os.setuid(0); breach('uid 0')\n"
        "except OSError: pass\n"
        "try: os.mknod('disk', 0o600 | 0o060000, os.makedev(8, 0)); breach('mknod')\n"
        "except OSError: pass\n"
        'if call(T["numbers"]["mount"], b"none\\0", b"/mnt\\0", b"tmpfs\\0", 0, 0)[0] == 0: breach("mount")',
        ("bwrap", "restricted+uid"),
        "as the server's own user the process is root where the server is (without capabilities)",
    ),
    Attack(
        "reach kernel keyrings", 'reachable("keyctl", 0, -3, 0); reachable("add_key", b"user\\0", b"k\\0", b"v", 1, -3)'
    ),
    Attack(
        "reach bpf, perf, userfaultfd, handles",
        'reachable("bpf", 0); reachable("perf_event_open", 0, 0, -1, -1, 0); reachable("userfaultfd", 0); reachable("open_by_handle_at", -1, 0, 0)',
    ),
    Attack("reach io_uring", 'reachable("io_uring_setup", 1, ctypes.create_string_buffer(120))'),
    Attack(
        "debug others",
        'for pid in (T["server_pid"], T["other_pid"]):\n'
        '    if call(T["numbers"]["ptrace"], 16, pid, 0, 0)[0] == 0: breach(f"ptrace {pid}")\n'
        "buffer = ctypes.create_string_buffer(8)\n"
        'reachable("process_vm_readv", CLI, buffer, 0, buffer, 0)',
    ),
    Attack(
        "take a descriptor of another process",
        'for pid in (T["server_pid"], T["other_pid"], CLI):\n'
        "    try: fd = os.pidfd_open(pid)\n"
        "    except OSError: continue\n"
        '    if call(T["numbers"]["pidfd_getfd"], fd, 1, 0)[0] >= 0: breach(f"stdout of {pid}")',
    ),
    Attack(
        "forge a line on the CLI's output",
        'for path in (f"/proc/{CLI}/fd/1", f"/proc/{CLI}/fd/2"):\n'
        "    try:\n"
        '        with open(path, "w") as out: out.write(json.dumps({"type": "system", "subtype": "note", "text": T[\'forged\']}) + "\\n")\n'
        "    except OSError: pass",
        ("bwrap+uid", "restricted+uid"),
        "with the server's uid the pipe can be opened again; what the CLI prints is never trusted anyway",
    ),
    Attack(
        "write into its own CLI's memory",
        'try: os.close(os.open(f"/proc/{CLI}/mem", os.O_RDWR)); breach("by design: the CLI is in the agent\'s own trust domain")\n'
        "except OSError: pass",
        (),
        "the CLI is the agent's own process: nothing that it prints is trusted",
    ),
    Attack(
        "start 2,000 processes",
        "n = 0\n"
        "for _ in range(2000):\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            signal.pause(); os._exit(0)\n"
        "        n += 1\n"
        "    except OSError: time.sleep(0.0005)\n"
        'print("started", n)\n'
        'if n > T["processes"]: breach(f"{n} processes")\n',
        ("bwrap+cgroup_pids", "bwrap+uid", "restricted+cgroup_pids", "restricted+uid"),
        "nothing counts processes of one slot",
        bomb=True,
    ),
    Attack(
        "take 1 GiB of memory",
        "held = []\n"
        "for i in range(64):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        '        held.append(bytearray(b"x") * (16 << 20)); signal.pause(); os._exit(0)\n'
        "    time.sleep(0.01)\n"
        "    held.append(pid)\n"
        "time.sleep(0.5)\n"
        "alive = 0\n"
        "for pid in held:\n"
        "    alive += os.waitpid(pid, os.WNOHANG) == (0, 0)\n"
        'if alive * (16 << 20) > T["memory"] * 1.1: breach(f"{alive * 16} MiB are held")',
        ("bwrap+cgroup_memory", "restricted+cgroup_memory"),
        "only a control group counts memory",
        bomb=True,
    ),
    Attack(
        "fill /tmp and /dev/shm",
        'for d, bound in (("/tmp", T["tmp"]), ("/dev/shm", T["shm"])):\n'
        "    size = 0\n"
        "    try:\n"
        "        for i in range(24):\n"
        '            with open(f"{d}/{T[\'marker\']}{i}", "wb") as f:\n'
        "                f.write(bytes(4 << 20)); size += 4 << 20\n"
        "    except OSError: pass\n"
        '    if size > bound: breach(f"{size >> 20} MiB in {d}")',
        bomb=True,
    ),
    Attack(
        "write one huge file",
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ntry:\n    with open("huge", "wb") as f: f.truncate(T["file"] * 4); breach("made it")\nexcept OSError: pass',
    ),
    Attack(
        "fill the workspace",
        "size = 0\n"
        "try:\n"
        "    for i in range(24):\n"
        '        with open(f"fill{i}", "wb") as f: f.write(bytes(4 << 20)); size += 4 << 20\n'
        "except OSError: pass\n"
        'if size > T["disk"]: breach(f"{size >> 20} MiB")',
        ("bwrap+quota", "restricted+quota"),
        "without a file system of its own the disk is measured after the fact",
        bomb=True,
    ),
    Attack(
        "make a million files",
        "made, until = 0, time.time() + 5\n"
        "try:\n"
        "    while made < 1_000_000 and time.time() < until: open('inode%d' % made, 'x').close(); made += 1\n"
        "except OSError: pass\n"
        'if made > T["inodes"]: breach(f"{made} files in 5 s")',
        ("bwrap+quota", "restricted+quota"),
        "without a file system of its own files are counted after the fact",
        bomb=True,
    ),
    Attack(
        "take every processor",
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        until = time.time() + 3\n"
        "        while time.time() < until: pass\n"
        "        os._exit(0)\n"
        "used = time.time()\n"
        "try:\n"
        "    while True: os.wait()\n"
        "except OSError: pass\n"
        "cores = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / (time.time() - used)\n"
        'if cores > T["cores"] * 1.15: breach(f"{cores:.2f} cores")',
        ("bwrap+cgroup_cpu", "restricted+cgroup_cpu"),
        "only a control group shares out processors",
        bomb=True,
    ),
    Attack(
        "survive the end of the slot",
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        '        os.chdir("/"); os.closerange(0, 10)\n'
        '        os.execve(sys.executable, [sys.executable, "-c", "import time\\nwhile True: time.sleep(1)", T["survivor"]], {})\n'
        "time.sleep(0.2)",
        ("bwrap", "restricted+uid", "restricted+cgroup_pids"),
        "a child that leaves session, environment and directory behind cannot be found without uid or control group",
    ),
    Attack(
        "lead the server astray by links",
        'os.makedirs("trap", exist_ok=True)\n'
        'for n, p in (("file", T["server_files"][0]), ("dir", "/"), ("proc", "/proc/self/environ"), ("loop", "loop")):\n'
        '    try: os.symlink(p, "trap/" + n)\n'
        "    except OSError: pass\n"
        'os.mkfifo("trap/fifo")',
        ("bwrap", "restricted", "none"),
    ),
)
