"""Line framing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.wire.ndjson import LineFramer, LineTooLong

LINES = st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")), max_size=20)


def feed_all(framer: LineFramer, chunks: list[bytes]) -> list[bytes]:
    return [line for chunk in chunks for line in framer.feed(chunk)]


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(LINES, st.lists(st.integers(min_value=0, max_value=2000), max_size=30))
def test_any_chunking_gives_the_same_lines(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    framer = LineFramer()
    got = feed_all(framer, chunked(data, cuts))
    assert got == [line for line in lines if line.strip()]
    assert framer.pending == 0


@given(st.integers(min_value=0, max_value=60), st.lists(st.integers(min_value=0, max_value=200), max_size=10))
def test_a_line_longer_than_the_bound_raises_in_any_chunking_and_one_at_the_bound_passes(
    length: int, cuts: list[int]
) -> None:
    data = b"x" * length + b"\n"
    framer = LineFramer(max_line=32)
    if length > 32:
        with pytest.raises(LineTooLong, match="32 bytes"):
            feed_all(framer, chunked(data, cuts))
        with pytest.raises(LineTooLong):
            framer.feed(b"{}\n")
    else:
        got = feed_all(framer, chunked(data, cuts))
        assert got == ([b"x" * length] if length else [])


def test_a_line_without_end_raises_before_it_fills_memory() -> None:
    framer = LineFramer(max_line=1000)
    with pytest.raises(LineTooLong):
        feed_all(framer, [b"y" * 100] * 1000)
    assert framer.pending <= 1100


def test_the_rest_of_a_line_is_kept_until_its_newline() -> None:
    framer = LineFramer()
    assert framer.feed(b'{"a"') == []
    assert framer.pending == 4
    assert framer.feed(b':1}\n{"b":2}\n{"c') == [b'{"a":1}', b'{"b":2}']
    assert framer.feed(b'":3}\r\n \n') == [b'{"c":3}\r']
