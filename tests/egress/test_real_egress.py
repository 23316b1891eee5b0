"""A sandbox with network, end to end: the real CLI's own tools reach allowed hosts and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest

from claude_wrapper.agent.launch import Auth, LaunchProfile, locate_cli
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.calls import Binding, Credential, CredentialKind, NoGate, NoSink, Observer, TurnContext
from claude_wrapper.broker.egresslists import EgressLists
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox import POLICIES, Egress, Level, SecurityLevel, choose, probe
from claude_wrapper.sandbox.uids import UidAllocator, UidRange
from claude_wrapper.sessions.process import ProcessFactory, SlotProcess
from claude_wrapper.testing.upstream import ScriptedUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli, pytest.mark.process]

TOOLS = LaunchProfile("agent", bare=False, tools=("Bash", "WebFetch"), auth=Auth.API_KEY)
PAGE = "<html><body><p>the allowed page</p></body></html>"


class Names:
    """The test's own resolver: no name leaves this machine."""

    def __init__(self) -> None:
        self.addresses = {"allowed.test": "127.0.0.1", "metadata.test": "169.254.169.254", "unlisted.test": "127.0.0.1"}

    async def resolve(self, host: str, port: int) -> list[str]:
        del port
        if host not in self.addresses:
            raise OSError("no such name")
        return [self.addresses[host]]


class Seen(Observer):
    def __init__(self) -> None:
        self.asked: list[tuple[str, int, bool]] = []

    def egress(self, slot: str, host: str, port: int, allowed: bool, reason: str) -> None:
        del slot, reason
        self.asked.append((host, port, allowed))


@dataclass
class World:
    upstream: ScriptedUpstream
    factory: ProcessFactory
    seen: Seen
    site: int
    certificate: Path
    _made: list[SlotProcess] = field(default_factory=list)

    async def process(self) -> SlotProcess:
        process = await self.factory.spawn(f"slot{len(self._made)}", TOOLS, None)
        self._made.append(process)
        await process.agent.initialize()
        process.agent.on_control = _allow
        return process

    async def say(self, process: SlotProcess, org: str, text: str) -> str:
        """One turn on the process for this organisation; returns the result's text."""
        credential = Credential("cred", CredentialKind.API_KEY, "sk-ant-real", self.upstream.url)
        process.endpoint.bind(Binding(org, None, None, None, f"session-{org}", credential))
        process.endpoint.begin(TurnContext("turn", "claude-sonnet-5-5"))
        await process.reach(org)
        async with asyncio.timeout(60), process.agent.turn(text) as turn:
            async for _ in turn:
                pass
        await process.endpoint.end()
        assert turn.result is not None
        return str(turn.result.json()["result"])


async def _allow(subtype: str, request: dict) -> dict:
    assert subtype == "can_use_tool", (subtype, request)
    return {"behavior": "allow", "updatedInput": request["input"]}


def _certificate(directory: Path) -> Path:
    """A certificate for the test's host names, valid for a day."""
    pem = directory / "site.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=allowed.test", "-addext", "subjectAltName=DNS:allowed.test,DNS:unlisted.test",
         "-keyout", str(directory / "key.pem"), "-out", str(pem)],
        check=True, capture_output=True,
    )  # fmt: skip
    with pem.open("ab") as both:
        both.write((directory / "key.pem").read_bytes())
    return pem


async def _page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            f"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: {len(PAGE)}\r\n\r\n{PAGE}".encode()
        )
        await writer.drain()
    writer.close()


@pytest.fixture
async def world(reachable_tmp_path: Path) -> AsyncIterator[World]:
    report = await asyncio.to_thread(probe)
    if Level.BWRAP in report.unavailable:
        pytest.skip(f"no sandbox with a network of its own: {report.unavailable[Level.BWRAP]}")
    tmp_path = reachable_tmp_path
    pem = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    site = await asyncio.start_server(_page, "127.0.0.1", 0, ssl=context)
    port = site.sockets[0].getsockname()[1]
    sandbox = choose("bwrap", None, report)
    seen = Seen()
    public = tmp_path / "site.crt"
    public.write_text(pem.read_text().split("-----BEGIN PRIVATE")[0])
    public.chmod(0o644)
    settings = BrokerSettings(permitted_networks=(ipaddress.ip_network("127.0.0.0/8"),))
    async with ScriptedUpstream() as upstream:
        broker = Broker(settings, SystemClock(), RandomIds(), NoGate(), NoSink(), observer=seen, resolver=Names())
        await broker.start()

        async def of_org(org: str) -> Iterable[str]:
            return [f"allowed.test:{port}"] if org == "org_listed" else []

        factory = ProcessFactory(
            cli=locate_cli(),
            slots_dir=tmp_path / "slots",
            sandbox=_Shows(sandbox, public),
            limits=POLICIES[SecurityLevel.BALANCED].limits,
            broker=broker,
            settings=AgentSettings(),
            default_model="claude-sonnet-5-5",
            clock=SystemClock(),
            ids=RandomIds(),
            uids=UidAllocator(UidRange(310_000, 310_100)) if sandbox.separate_uid else None,
            egress=EgressLists(_allow_list, (f"metadata.test:{port}",), of_org),
        )
        made = World(upstream, factory, seen, port, public)
        try:
            yield made
        finally:
            for process in made._made:
                await process.stop("test")
            site.close()
            await broker.close()
            sandbox.close()


async def _allow_list(org: str) -> Egress:
    del org
    return Egress.ALLOWLIST


class _Shows:
    """The sandbox with the test site's certificate shown inside and trusted: nothing else is changed."""

    def __init__(self, sandbox, certificate: Path) -> None:
        self._sandbox = sandbox
        self._certificate = certificate

    def __getattr__(self, name: str):
        return getattr(self._sandbox, name)

    def prepare(self, spec):
        inside = PurePosixPath("/opt/site.crt")
        env = {**spec.env, "NODE_EXTRA_CA_CERTS": str(inside)}
        return self._sandbox.prepare(dataclasses.replace(spec, env=env, read_only_binds=((self._certificate, inside),)))


def bash(command: str) -> str:
    return f"[[tool Bash {json.dumps({'command': command})}]] [[then]]"


async def test_the_shell_reaches_what_is_listed_and_nothing_else(world: World) -> None:
    process = await world.process()
    curl = "curl -sS --max-time 10 --cacert /opt/site.crt"
    allowed = await world.say(process, "org_listed", bash(f"{curl} https://allowed.test:{world.site}/"))
    assert "the allowed page" in allowed

    refused = await world.say(
        process,
        "org_listed",
        bash(
            f"{curl} https://unlisted.test:{world.site}/ 2>&1; {curl} https://metadata.test:{world.site}/ 2>&1; "
            f"{curl} --noproxy '*' https://127.0.0.1:{world.site}/ 2>&1; true"
        ),
    )
    assert refused.count("403") == 2
    assert "the allowed page" not in refused
    assert process.egress is not None
    assert (process.egress.opened, process.egress.refused) == (1, 2)
    assert [allowed for _, _, allowed in world.seen.asked] == [True, False, False]


async def test_an_organisation_s_list_is_its_own(world: World) -> None:
    process = await world.process()
    text = await world.say(
        process, "org_other", bash(f"curl -sS --max-time 10 https://allowed.test:{world.site}/ 2>&1; true")
    )
    assert "403" in text


async def test_web_fetch_goes_through_the_proxy(world: World) -> None:
    process = await world.process()
    fetch = json.dumps({"url": f"https://allowed.test:{world.site}/", "prompt": "What does it say?"})
    await world.say(process, "org_listed", f"[[tool WebFetch {fetch}]] [[then]]")
    assert ("allowed.test", world.site, True) in world.seen.asked
    assert any("the allowed page" in json.dumps(call.body) for call in world.upstream.calls), (
        "the page was given to the model"
    )
