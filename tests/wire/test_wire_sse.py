"""Event streams survive any chunking, and cannot be forged."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.wire.sse import EventStreamError, ServerSentEvent, SSEDecoder, encode

names = st.none() | st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1)
payloads = st.binary(min_size=1).map(lambda data: data.replace(b"\r", b"")).filter(bool)
frames = st.lists(st.tuples(names, payloads, names), max_size=6)


def decode_in_pieces(stream: bytes, cuts: list[int]) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for start, end in itertools.pairwise(edges) for event in decoder.feed(stream[start:end])]


@settings(deadline=None)
@given(frames, st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_what_is_encoded_is_decoded_under_any_chunking_and_any_line_end(
    events: list[tuple[str | None, bytes, str | None]], cuts: list[int], line_end: bytes
) -> None:
    stream = b"".join(encode(name, data, id=identifier) for name, data, identifier in events)
    # A data line may begin with a space or hold a leading BOM only at the very start of the stream.
    got = decode_in_pieces(stream.replace(b"\n", line_end), cuts)
    assert got == [ServerSentEvent(name, data, identifier) for name, data, identifier in events]


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_chunking_never_changes_what_any_bytes_mean(stream: bytes, cuts: list[int]) -> None:
    assert decode_in_pieces(stream, cuts) == SSEDecoder().feed(stream)


def test_comments_unknown_fields_and_events_without_data_are_dropped() -> None:
    stream = b"\xef\xbb\xbf: hello\n\nevent: ping\n\nretry: 5\ndata: x\n\n"
    assert SSEDecoder().feed(stream) == [ServerSentEvent(None, b"x", None)]


def test_an_event_over_the_bound_is_refused_whether_or_not_its_line_ends() -> None:
    with pytest.raises(EventStreamError, match="larger than 100 bytes"):
        SSEDecoder(max_event=100).feed(b"data: " + b"x" * 100)
    with pytest.raises(EventStreamError, match="larger than 100 bytes"):
        SSEDecoder(max_event=100).feed((b"data: " + b"x" * 30 + b"\n") * 4)
    assert len(SSEDecoder(max_event=100).feed((b"data: " + b"x" * 30 + b"\n\n") * 40)) == 40


@pytest.mark.parametrize("forged", ["a\nevent: error", "a\rb", "a\0b"])
def test_a_name_or_id_cannot_smuggle_in_another_field(forged: str) -> None:
    with pytest.raises(InvalidRequest, match="event"):
        encode(forged, b"{}")
    with pytest.raises(InvalidRequest, match="id"):
        encode("x", b"{}", id=forged)


def test_line_breaks_inside_data_become_further_data_lines() -> None:
    assert encode(None, b"a\r\nb\rc") == b"data: a\ndata: b\ndata: c\n\n"
