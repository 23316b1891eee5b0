"""Reports and ledger parts as CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from parquet_reader import read

from claude_wrapper.usage.forms import to_csv, to_json_lines, to_parquet

VALUES = {
    "text": st.none() | st.text(max_size=20).filter(lambda text: "\ud800" not in text),
    "number": st.none() | st.integers(-(2**63), 2**63 - 1),
    "truth": st.none() | st.booleans(),
    "empty": st.none(),
}
ROWS = st.lists(st.fixed_dictionaries(VALUES), max_size=40)


@given(ROWS)
def test_parquet_is_read_back_the_same(rows: list[dict[str, Any]]) -> None:
    count, columns = read(to_parquet(rows))
    assert count == len(rows)
    assert columns == ({name: [row[name] for row in rows] for name in VALUES} if rows else {})


def test_more_columns_than_a_short_thrift_list_holds() -> None:
    rows = [{f"column_{n}": n for n in range(40)}] * 300
    count, columns = read(to_parquet(rows))
    assert (count, len(columns), columns["column_39"]) == (300, 40, [39] * 300)


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = [{"a": 1, "b": "x"}]
    assert to_parquet(rows) == to_parquet(rows)


def test_csv_has_a_header_quotes_and_disarms_formulas() -> None:
    rows = [{"model": '=HYPERLINK("http://x")', "note": 'a "b",\nc', "calls": -5, "main": True, "error": None}]
    parsed = list(csv.reader(io.StringIO(to_csv(rows).decode())))
    assert parsed == [
        ["model", "note", "calls", "main", "error"],
        ['\'=HYPERLINK("http://x")', 'a "b",\nc', "-5", "true", ""],
    ]
    assert to_csv([]) == b""


def test_json_lines_are_one_object_each() -> None:
    assert [json.loads(line) for line in to_json_lines([{"a": 1}, {"a": None}]).splitlines()] == [{"a": 1}, {"a": None}]
