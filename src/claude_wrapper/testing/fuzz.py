"""Fuzzing what strangers write: `python -m claude_wrapper.testing.fuzz NAME [--seconds N]`; without a name: the list.

A target takes bytes and raises nothing but AssertionError, which is a finding. With atheris installed it is driven by
coverage without end (further arguments go to libFuzzer); else the target's seeds are mutated for some seconds.
Tests run every target under Hypothesis too.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from claude_wrapper.broker import policy
from claude_wrapper.broker.http1 import Connection, Head, Reply
from claude_wrapper.broker.refusals import Refused
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.errors import (
    AgentProtocolError,
    InvalidRequest,
    RequestTooLarge,
    SnapshotCorrupted,
    WrapperError,
)
from claude_wrapper.sessions.resources.skillfiles import read_skill
from claude_wrapper.sessions.snapshots import manifest as snapshots
from claude_wrapper.sessions.snapshots import restoring
from claude_wrapper.wire import control
from claude_wrapper.wire.merge import MessageMerger
from claude_wrapper.wire.messages import parse_messages_request
from claude_wrapper.wire.ndjson import LineFramer
from claude_wrapper.wire.sse import EventStreamError, SSEDecoder
from claude_wrapper.wire.streamjson import decode_frame
from claude_wrapper.wire.usage import UsageReader


@dataclass(frozen=True, slots=True)
class Target:
    """One parser under attack."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _pieces(data: bytes) -> Iterator[bytes]:
    """The data in pieces whose sizes it decides itself: what arrives is never cut where one would like it."""
    size, position = (data[0] % 17) + 1 if data else 1, 0
    while position < len(data):
        yield data[position : position + size]
        position += size
        size = size % 23 + 1


def _stream_json(data: bytes) -> None:
    whole = _frames([data])
    assert _frames(list(_pieces(data))) == whole, "lines depend on how the output was cut"  # noqa: S101


_READERS: Mapping[str, Callable[..., Any]] = {
    control.RESPONSE: control.parse_reply,
    control.REQUEST: control.parse_ask,
}


def _frames(pieces: list[bytes]) -> list[Any]:
    framer = LineFramer(4096)
    found: list[Any] = []
    for piece in pieces:
        try:
            lines = framer.feed(piece)
        except AgentProtocolError:
            return [*found, "too long"]
        for line in lines:
            try:
                frame = decode_frame(line)
                found.append((frame.type, frame.subtype, frame.session_id, frame.raw))
                _READERS.get(frame.type, control.parse_cancel)(frame)
            except AgentProtocolError:
                found.append("refused")
    return found


def _merge(data: bytes) -> None:
    merger = MessageMerger("msg_1", "m")
    for line in data.split(b"\n"):
        try:
            merger.feed(decode_frame(line))
        except AgentProtocolError:
            continue
    msgspec.json.encode(merger.message())


def _sse(data: bytes) -> None:
    whole, cut = _events([data]), _events(list(_pieces(data)))
    assert whole == cut, "events depend on how the stream was cut"  # noqa: S101


def _events(pieces: list[bytes]) -> list[Any]:
    decoder, found = SSEDecoder(4096), []
    try:
        for piece in pieces:
            found += [(one.event, bytes(one.data), one.id) for one in decoder.feed(piece)]
    except EventStreamError:
        return ["too large"]
    return found


def _usage(data: bytes) -> None:
    reader = UsageReader(65536)
    try:
        for piece in _pieces(data):
            reader.feed(piece)
    except EventStreamError:
        return
    other = UsageReader()
    other.feed_json(data)
    for usage in (reader.usage, other.usage):
        for name, value in usage.to_wire().items():
            if isinstance(value, int):
                assert value >= 0, f"{name} is negative"  # noqa: S101


def _messages(data: bytes) -> None:
    try:
        request = parse_messages_request(data)
    except (InvalidRequest, RequestTooLarge):
        return
    request.history()
    request.system_blocks()
    request.overrides()


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is buffered."""


class _Front:
    """Accepts what the broker's own policy accepts, and notes it."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.bodies: list[bytes] = []

    def enter(self, connection: Connection) -> bool:
        return connection is not None

    def leave(self, connection: Connection) -> None:
        """Nothing is counted."""

    def choose(self, head: Head, connection: Connection) -> _Front:
        del connection
        policy.decide(head.method, head.target)
        self.heads.append(head)
        return self

    def fault(self, error: BaseException) -> None:
        raise AssertionError(f"the listener failed: {error!r}") from error

    def hold(self, size: int) -> bool:
        return size < 1 << 20

    def release(self, size: int) -> None:
        """Nothing is held."""

    async def handle(self, head: Head, body: bytes, reply: Reply) -> None:
        del head
        self.bodies.append(body)
        reply.whole(200, [], b"")


_VISIBLE = re.compile(r"[^\r\n\0]*\Z")


def _broker_head(data: bytes) -> None:
    asyncio.run(_listen(data))


async def _listen(data: bytes) -> None:
    front = _Front()
    connection = Connection(front, BrokerSettings(max_head_bytes=4096, max_body_bytes=8192))
    transport = _Transport()
    connection.connection_made(transport)
    for piece in _pieces(data):
        if transport.closing:
            break
        connection.data_received(piece)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.sleep(0)
    for head in front.heads:
        names = [name.lower() for name, _ in head.headers]
        both = "transfer-encoding" in names and "content-length" in names
        assert not (both and front.bodies), "a body with two lengths was taken"  # noqa: S101
        assert names.count("content-length") < 2 or not front.bodies, "two lengths were taken"  # noqa: S101
        for name, value in head.headers:
            assert _VISIBLE.match(name) and _VISIBLE.match(value), "a header holds a line break"  # noqa: S101, PT018
    assert len(front.bodies) <= data.count(b"HTTP/1.1"), "more requests than request lines"  # noqa: S101


def _broker_path(data: bytes) -> None:
    method, _, target = data.decode("latin-1").partition(" ")
    try:
        route = policy.decide(method, target)
    except Refused:
        return
    for wrong in ("..", "//", "\\", "\r", "\n", "\0", "#", ";"):
        assert wrong not in route.path, f"{wrong!r} in a path that is sent on"  # noqa: S101
    assert route.path.startswith(("/v1/messages", "/v1/models")) or route.path == "/"  # noqa: S101


def _skill(data: bytes) -> None:
    for uploads in ([("skill.zip", data)], [("skill/SKILL.md", data)]):
        try:
            skill = read_skill(uploads)
        except WrapperError:
            continue
        for path in skill.files:
            assert not path.startswith("/") and ".." not in path.split("/") and "\0" not in path  # noqa: S101, PT018


_HEAD = snapshots.Head(
    snapshots.VERSION, "snap_1", "sesn_1", 0, "", "", [], 0, 0, 0, [], [snapshots.Pack("pack_1", 64)]
)
_BOUNDS = snapshots.Bounds(total_bytes=4096, entries=64, path_bytes=300, depth=8, manifest_bytes=65536)


def _snapshot(data: bytes) -> None:
    """A page of a list of files, as it is after unsealing: what was sealed may still have been made by a tenant's names."""
    try:
        manifest = snapshots.join(_HEAD, [data])
        snapshots.check(manifest, _BOUNDS)
    except (SnapshotCorrupted, RequestTooLarge):
        return
    with tempfile.TemporaryDirectory() as directory:
        into = Path(directory, "restored")
        restoring.make_directories(manifest, into)
        restoring.finish(manifest, into)
        inside = into.resolve()
        assert [one.name for one in Path(directory).iterdir()] == ["restored"], "written outside"  # noqa: S101
        for folder, names, files in os.walk(into):
            for name in (*names, *files):
                found = Path(folder, name)
                assert not found.is_symlink() or inside in (found.parent / found.readlink()).resolve().parents  # noqa: S101


_ENTRIES = [
    snapshots.Entry(1, b"src", "d", 0o755, 1),
    snapshots.Entry(1, b"src/a", "f", 0o644, 1),
    snapshots.Entry(1, b"src/link", "l", 0o777, 1, target=b"../b"),
    snapshots.Entry(0, b".claude", "d", 0o700, 1),
]
_PAGE = msgspec.msgpack.encode(snapshots.Page(_ENTRIES, [], []))
_LEAVES = tuple(
    msgspec.msgpack.encode(snapshots.Page([snapshots.Entry(1, path, kind, mode, mtime, target=target)], [], []))
    for path, kind, mode, mtime, target in (
        (b"../x", "f", 0o644, 1, b""), (b"/etc/x", "f", 0o644, 1, b""), (b"l", "l", 0o777, 1, b"../../.."),
        (b"suid", "f", 0o4755, 1, b""), (b"late", "f", 0o644, 2**63 - 1, b""), (b"early", "d", 0o755, -(2**63), b""),
    )
)  # fmt: skip


_POST = (
    b"POST /v1/messages HTTP/1.1\r\nhost: broker.invalid\r\nx-api-key: sk-ant-slot-1\r\n"
    b'content-type: application/json\r\ncontent-length: 2\r\n\r\n{}'
)  # fmt: skip
_CHUNKED = b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
_EVENT = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"x","usage":{"input_tokens":5}}}\n\n'
    b'event: message_delta\r\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}\r\n\r\n: ping\nid: 4\n'
)
_LINES = (
    b'{"type":"result","subtype":"success","session_id":"s","usage":{"input_tokens":1},"result":"x"}\n'
    b'{"type":"control_request","request_id":"r","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{}}}\n'
    b'{"type":"control_response","response":{"subtype":"success","request_id":"r","response":{}}}\n'
    b'{"type":"stream_event","event":{"type":"ping"},"parent_tool_use_id":null,"uuid":"u"}\n'
)
_TURN = (
    b"\n".join(
        b'{"type":"stream_event","session_id":"s","event":%b}' % event
        for event in (
            b'{"type":"message_start","message":{"id":"m","role":"assistant","model":"x","content":[],"usage":{"input_tokens":5}}}',
            b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
            b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"hi"}}',
            b'{"type":"content_block_stop","index":0}',
            b'{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"t","name":"mcp__client__f","input":{}}}',
            b'{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{}"}}',
            b'{"type":"content_block_stop","index":1}',
            b'{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":7}}',
            b'{"type":"message_stop"}',
        )
    )
    + b'\n{"type":"result","subtype":"error_during_execution","is_error":true,"errors":["x"],"api_error_status":500}\n'
)
_BODY = (
    b'{"model":"m","max_tokens":5,"stream":true,"system":[{"type":"text","text":"s"}],"messages":[{"role":"user","content":"hi"},'
    b'{"role":"assistant","content":[{"type":"text","text":"a"}]},{"role":"user","content":[{"type":"text","text":"b"}]}],'
    b'"tools":[{"name":"t","input_schema":{}}],"agent":{"tools":["Bash"]},"metadata":{"user_id":"u"}}'
)

TARGETS: Mapping[str, Target] = {
    "stream-json": Target(_stream_json, (_LINES, b'{"type":1}\n[]\n\xff\n', b"{" * 300 + b"\n")),
    "merge": Target(_merge, (_TURN, _LINES)),
    "sse": Target(_sse, (_EVENT, b"data: a\rdata: b\r\n\r\n", b"\xef\xbb\xbfdata\n\n")),
    "usage": Target(_usage, (_EVENT, b'{"usage":{"input_tokens":-5,"output_tokens":1e99}}')),
    "messages": Target(_messages, (_BODY, b'{"model":"m","max_tokens":1,"messages":[]}')),
    "broker-head": Target(_broker_head, (_POST, _CHUNKED, _POST + _CHUNKED, _POST.replace(b"2\r", b"2\r\ncontent-length: 9\r"))),
    "broker-path": Target(_broker_path, (b"POST /v1/messages?beta=true", b"GET /v1/models/a.b", b"GET /mcp/a", b"HEAD /")),
    "snapshot": Target(_snapshot, (_PAGE, *_LEAVES)),
    "skill": Target(_skill, (b"---\nname: a-b\ndescription: d\n---\ntext", b"---\nname: >\n  a\n---\n")),
}  # fmt: skip


def mutated(seeds: tuple[bytes, ...], rng: random.Random) -> bytes:
    """A seed with some of it repeated, cut, exchanged or damaged."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(data))
        until = min(len(data), at + rng.randint(0, 24))
        match rng.randint(0, 4):
            case 0:
                data[at:until] = rng.randbytes(rng.randint(0, 8))
            case 1:
                data[at:at] = data[at:until] * rng.randint(1, 40)
            case 2:
                del data[at:until]
            case 3:
                data[at:at] = rng.choice((b"\r\n", b"\n", b"\r", b"\0", b'"', b"\\", b"[", b"{", b":", b"-1", b"1e400", b"null", b"../", b"%2f", b"\xff"))  # fmt: skip
            case _:
                other = rng.choice(seeds)
                cut = rng.randint(0, len(other))
                data[at:] = other[cut:]
    return bytes(data)


def _mutate_for(target: Target, seconds: float, seed: int) -> int:
    rng, tried, until = random.Random(seed), 0, monotonic() + seconds  # noqa: S311 - repeatable, not secret
    while monotonic() < until:
        data = mutated(target.seeds, rng)
        try:
            target.run(data)
        except BaseException:
            sys.stderr.write(f"found after {tried} inputs (seed {seed}): {data!r}\n")
            raise
        tried += 1
    return tried


def main(arguments: list[str]) -> int:
    """Run one target."""
    parser = argparse.ArgumentParser(prog="python -m claude_wrapper.testing.fuzz", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=30.0, help="without atheris: how long")
    parser.add_argument("--seed", type=int, default=0, help="without atheris: where the mutations begin")
    asked, further = parser.parse_known_args(arguments)
    if asked.name is None:
        sys.stdout.write("\n".join(sorted(TARGETS)) + "\n")
        return 0
    target = TARGETS[asked.name]
    if importlib.util.find_spec("atheris") is not None:
        atheris = importlib.import_module("atheris")
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], *further], target.run)
        atheris.Fuzz()  # does not return
    tried = _mutate_for(target, asked.seconds, asked.seed)
    sys.stdout.write(f"{asked.name}: {tried} inputs, nothing found (atheris is not installed: seeds were mutated)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
