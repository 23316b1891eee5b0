"""Usage is read from passing bytes and added up without loss."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.testing import answers, script
from claude_wrapper.wire.usage import Usage, UsageReader

counts = st.integers(0, 10**9)
usages = st.builds(Usage, *([counts] * 8))


def stream(text: str) -> bytes:
    body = {"max_tokens": 10_000, "messages": [{"role": "user", "content": text}]}
    step, heard = answers.due_step(body, lambda _: False)
    made = answers.answer(body, b"", step, heard, lambda: "toolu_1")
    return b"".join(answers.frames(made, "msg_1", "claude-x"))


@settings(deadline=None)
@given(usages, usages, usages)
def test_adding_usage_is_associative_and_has_a_zero(a: Usage, b: Usage, c: Usage) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + Usage() == a
    assert (a + b).prompt_tokens == a.prompt_tokens + b.prompt_tokens


@settings(deadline=None)
@given(usages)
def test_usage_survives_the_wire(usage: Usage) -> None:
    assert Usage.from_wire(msgspec.json.decode(msgspec.json.encode(usage.to_wire()))) == usage


def test_a_cache_total_without_its_split_counts_as_the_five_minute_kind() -> None:
    assert Usage.from_wire({"cache_creation_input_tokens": 7}) == Usage(cache_write_5m_tokens=7)


def test_nonsense_counts_as_nothing() -> None:
    wire = {"input_tokens": "9", "output_tokens": -1, "cache_read_input_tokens": True, "server_tool_use": 3}
    assert Usage.from_wire(wire) == Usage()
    assert Usage.from_wire(None) == Usage()


def test_totals_of_message_delta_overwrite_those_of_message_start() -> None:
    started = Usage.from_wire({"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5})
    assert started.updated({"output_tokens": 40}) == Usage(10, 40, 5)
    assert started.updated({"input_tokens": 12, "output_tokens": 40}) == Usage(12, 40, 5)


@settings(deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 700), min_size=1, max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_the_reader_sees_the_same_in_any_chunking(tokens: int, sizes: list[int], line_end: bytes) -> None:
    whole = stream(f"[[think hm]] [[tokens {tokens}]]").replace(b"\n", line_end)
    reader = UsageReader()
    for size in itertools.cycle(sizes):
        reader.feed(whole[:size])
        whole = whole[size:]
        if not whole:
            break
    assert reader.usage.output_tokens == tokens + 1
    assert reader.usage.thinking_tokens == 1
    assert (reader.model, reader.message_id, reader.stop_reason) == ("claude-x", "msg_1", "end_turn")
    assert reader.complete
    assert reader.error is None


def test_a_cut_stream_is_not_complete_and_an_error_event_is_kept() -> None:
    reader = UsageReader()
    reader.feed(stream("hello there")[:400])
    assert not reader.complete
    reader.feed(b'\n\nevent: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n')
    assert reader.error == {"type": "overloaded_error", "message": "busy"}


def test_json_bodies_are_read_too() -> None:
    reader = UsageReader()
    reader.feed_json(
        b'{"id":"msg_2","model":"m","stop_reason":"max_tokens","usage":{"input_tokens":3,"output_tokens":4}}'
    )
    assert (reader.usage, reader.message_id, reader.stop_reason) == (Usage(3, 4), "msg_2", "max_tokens")
    assert reader.complete
    failed = UsageReader()
    failed.feed_json(b'{"type":"error","error":{"type":"api_error","message":"x"}}')
    assert failed.error == {"type": "api_error", "message": "x"}
    assert not failed.complete


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(noise: bytes) -> None:
    reader = UsageReader(max_event=64)
    reader.feed(noise)
    reader.feed_json(noise)
    assert reader.usage == Usage()


def test_text_that_looks_like_an_event_is_not_one() -> None:
    reader = UsageReader()
    fake = 'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":999}}\n\n'
    reader.feed(stream(f"[[say {script.json.dumps(fake)}]]"))
    assert reader.usage.output_tokens < 20


def test_a_stream_with_an_event_over_the_bound_is_no_longer_read_but_does_not_fail() -> None:
    reader = UsageReader(max_event=1000)
    for _ in range(5):
        reader.feed(b"event: message_start\ndata: " + b"x" * 500)
    assert reader.broken
    reader.feed(stream("hello"))
    assert reader.usage == Usage()
