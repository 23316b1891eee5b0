"""The proxy for sandboxes with network: allowed hosts by name, never a private address, whatever a name says."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.world import Noted
from claude_wrapper.broker.addresses import forbidden
from claude_wrapper.broker.egress import Egress, EgressSettings
from claude_wrapper.broker.hosts import HostRule, HostRules, canonical
from claude_wrapper.errors import ConfigurationError

pytestmark = pytest.mark.anyio

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "151.101.0.223", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
)
def test_public_addresses_may_be_dialled(address: str) -> None:
    assert forbidden(address) is None


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.31.255.255", "192.168.0.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "203.0.113.9", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1", "fec0::1", "100::1", "localhost", "", "1.1.1", "0x7f000001", "١٢٧.٠.٠.١"],
)  # fmt: skip
def test_everything_else_may_not(address: str) -> None:
    assert forbidden(address) is not None


@given(st.ip_addresses(v=4))
def test_another_spelling_of_an_address_is_judged_alike(address: ipaddress.IPv4Address) -> None:
    plain = forbidden(str(address))
    assert (forbidden(f"::ffff:{address}") is None) == (plain is None)
    assert (forbidden(f"64:ff9b::{address}") is None) == (plain is None)
    if plain is not None:
        packed = int(address)
        assert forbidden(str(ipaddress.IPv6Address((0x2002 << 112) | (packed << 80)))) is not None


@given(st.ip_addresses())
def test_whatever_python_calls_private_is_forbidden(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if forbidden(str(address)) is None:
        assert address.is_global
        assert not address.is_multicast


def test_the_operator_s_own_networks_are_an_exception() -> None:
    own = (ipaddress.ip_network("10.1.0.0/16"),)
    assert forbidden("10.1.2.3", own) is None
    assert forbidden("::ffff:10.1.2.3", own) is None
    assert forbidden("10.2.2.3", own) is not None


@pytest.mark.parametrize(
    ("pattern", "host", "port", "allowed"),
    [
        ("pypi.org", "pypi.org", 443, True),
        ("PyPI.org.", "pypi.org", 443, True),
        ("pypi.org", "pypi.org", 80, False),
        ("pypi.org:80", "pypi.org", 80, True),
        ("pypi.org:80", "pypi.org", 443, False),
        ("pypi.org", "evilpypi.org", 443, False),
        ("pypi.org", "pypi.org.evil.com", 443, False),
        ("*.pythonhosted.org", "files.pythonhosted.org", 443, True),
        ("*.pythonhosted.org", "a.b.pythonhosted.org", 443, True),
        ("*.pythonhosted.org", "pythonhosted.org", 443, False),
        ("*.pythonhosted.org", "xpythonhosted.org", 443, False),
        ("*", "anything.example", 443, True),
        ("*", "anything.example", 22, False),
    ],
)
def test_host_patterns(pattern: str, host: str, port: int, allowed: bool) -> None:
    assert HostRules.parse([pattern]).allows(host, port) is allowed
    assert not HostRules().allows(host, port)


@pytest.mark.parametrize("pattern", ["", "a b", "*.*.x", "http://x", "x/y", "x:0", "x:99999", "[::1]", "a*b"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigurationError):
        HostRule.parse(pattern)


@pytest.mark.parametrize("host", ["", "a..b", "-a.com", "a b", "a\r\nb", "[::1]", "a/b", "ä.com", "a" * 64, "x@y"])
def test_what_is_no_host_name_is_refused(host: str) -> None:
    assert canonical(host) is None


class Names:
    """A resolver that answers from a table, one answer per question."""

    def __init__(self, **table: list[str]) -> None:
        self.table = {name.replace("_", "."): addresses for name, addresses in table.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.table:
            raise OSError("no such name")
        return self.table[host]


@asynccontextmanager
async def proxy(tmp: Path, names: Names, *rules: str, **changes: object) -> AsyncIterator[tuple[Egress, Noted]]:
    noted = Noted()
    settings = EgressSettings(**({"permitted": LOOPBACK} | changes))  # type: ignore[arg-type]
    egress = Egress("slot_1", noted, settings=settings, resolver=names)
    await egress.start(tmp / "egress.sock")
    egress.allow(HostRules.parse(rules))
    try:
        async with asyncio.timeout(20):
            yield egress, noted
    finally:
        await egress.close()
        assert noted.faults == []


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def connect(tmp: Path, sent: bytes) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(str(tmp / "egress.sock"))
    writer.write(sent)
    try:
        return await reader.readuntil(b"\r\n\r\n"), reader, writer
    except asyncio.IncompleteReadError as error:
        return error.partial, reader, writer
    except ConnectionError:
        return b"", reader, writer


async def test_an_allowed_host_is_reached_and_bytes_pass_both_ways(tmp_path: Path) -> None:
    async with echo() as port, proxy(tmp_path, Names(git_example=["127.0.0.1"]), f"git.example:{port}") as (_, noted):
        head, reader, writer = await connect(tmp_path, f"CONNECT Git.Example:{port} HTTP/1.1\r\n\r\n".encode())
        assert head == b"HTTP/1.1 200 Connection established\r\n\r\n"
        sent = bytes(range(256)) * 4000
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == sent
        writer.close()
        assert noted.egressed == [("git.example", port, True, "")]


@pytest.mark.parametrize(
    ("sent", "status", "asked"),
    [
        (b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n", 403, []),
        (b"CONNECT 169.254.169.254:443 HTTP/1.1\r\n\r\n", 403, []),
        (b"CONNECT inside.example:443 HTTP/1.1\r\n\r\n", 403, ["inside.example"]),
        (b"CONNECT mixed.example:443 HTTP/1.1\r\n\r\n", 403, ["mixed.example"]),
        (b"CONNECT gone.example:443 HTTP/1.1\r\n\r\n", 502, ["gone.example"]),
        (b"CONNECT inside.example:22 HTTP/1.1\r\n\r\n", 403, []),
        (b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n", 400, []),
        (b"CONNECT inside.example:0443999 HTTP/1.1\r\n\r\n", 400, []),
        (b"CONNECT inside.example HTTP/1.1\r\n\r\n", 400, []),
        (b"GET http://inside.example/ HTTP/1.1\r\n\r\n", 405, []),
        (b"nonsense\r\n\r\n", 400, []),
    ],
)
async def test_what_is_not_allowed_is_refused_and_noted(
    tmp_path: Path, sent: bytes, status: int, asked: list[str]
) -> None:
    names = Names(inside_example=["10.0.0.5"], mixed_example=["1.1.1.1", "169.254.169.254"], evil_example=["1.1.1.1"])
    async with proxy(tmp_path, names, "inside.example", "mixed.example", "gone.example") as (_, noted):
        head, reader, writer = await connect(tmp_path, sent)
        assert int(head.split()[1]) == status
        await reader.read()
        writer.close()
        assert names.asked == asked
        assert len(noted.egressed) == (status in {403, 502})
        assert all(reason for _, _, _, reason in noted.egressed)


async def test_numbers_that_spell_a_private_address_are_refused(tmp_path: Path) -> None:
    noted = Noted()
    egress = Egress("slot_1", noted)  # the system's resolver: it reads all of these as 127.0.0.1
    await egress.start(tmp_path / "egress.sock")
    egress.allow(HostRules.parse(["*"]))
    for host in ("127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "localhost"):
        head, _, writer = await connect(tmp_path, f"CONNECT {host}:443 HTTP/1.1\r\n\r\n".encode())
        assert head.startswith(b"HTTP/1.1 403"), host
        writer.close()
    await egress.close()


async def test_nothing_is_allowed_before_rules_are_set_and_tunnels_end_when_they_change(tmp_path: Path) -> None:
    async with echo() as port, proxy(tmp_path, Names(git_example=["127.0.0.1"])) as (egress, _):
        sent = f"CONNECT git.example:{port} HTTP/1.1\r\n\r\n".encode()
        assert (await connect(tmp_path, sent))[0].startswith(b"HTTP/1.1 403")
        egress.allow(HostRules.parse([f"git.example:{port}"]))
        head, reader, _ = await connect(tmp_path, sent)
        assert head.startswith(b"HTTP/1.1 200")
        egress.allow(HostRules())
        assert await reader.read() == b""


async def test_tunnels_heads_and_silence_are_bounded(tmp_path: Path) -> None:
    bounds = {"max_tunnels": 2, "head_seconds": 0.1, "idle_seconds": 0.1}
    async with echo() as port, proxy(tmp_path, Names(g=["127.0.0.1"]), f"g:{port}", **bounds):
        for never in (b"CONNECT", b"CONNECT " + b"x" * 20_000):
            _, reader, writer = await connect(tmp_path, never)
            writer.close()
        head, reader, writer = await connect(tmp_path, f"CONNECT g:{port} HTTP/1.1\r\n\r\n".encode())
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.read() == b"", "closed after silence"
        held = [await asyncio.open_unix_connection(str(tmp_path / "egress.sock")) for _ in range(2)]
        refused = await connect(tmp_path, b"CONNECT g:1 HTTP/1.1\r\n\r\n")
        assert refused[0] == b""
        for other in (*(other for _, other in held), writer, refused[2]):
            other.close()
