"""One line of a hostile process must not hold up the server, however it is made."""

from __future__ import annotations

import time

import pytest

from claude_wrapper.wire.streamjson import MAX_DEPTH, MalformedFrame, decode_frame

_SIZE = 8 * 2**20
_UNIT = b"[" * 120 + b"]" * 120 + b","


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"x","a":[' + _UNIT * (_SIZE // len(_UNIT)) + b"1]}",
        b"[" * _SIZE,
        b'{"type":"x","a":[' + b'"[[[[",' * (_SIZE // 7) + b"1]}",
        b'{"type":"x","a":[' + b"{}," * (_SIZE // 3) + b"1]}",
    ],
    ids=["deep and wide", "open", "strings", "wide"],
)
def test_a_line_that_is_made_to_be_slow_is_refused_quickly(line: bytes) -> None:
    began = time.process_time()
    with pytest.raises(MalformedFrame):
        decode_frame(line)
    assert time.process_time() - began < 1.0  # it took 2.2 s before there was a bound


@pytest.mark.parametrize(
    "text", ['[[[[{{{"', "\\\\", '\\\\"[', '\\"', '"', "[" * 100_000, '\\\\\\"' * 50_000], ids=lambda text: text[:8]
)
def test_brackets_quotes_and_backslashes_in_strings_do_not_count(text: str) -> None:
    import msgspec

    line = msgspec.json.encode({"type": "user", "text": [text, text], "deep": [[[[1]]]] * 50})
    assert decode_frame(line).json()["text"] == [text, text]


def test_the_depth_bound_is_exact() -> None:
    def nested(levels: int) -> bytes:
        return b'{"type":"x","a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert decode_frame(nested(MAX_DEPTH)).type == "x"
    with pytest.raises(MalformedFrame, match="nests deeper"):
        decode_frame(nested(MAX_DEPTH + 1))
