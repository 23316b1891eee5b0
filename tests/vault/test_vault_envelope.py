"""Sealed records open where they were sealed, unchanged, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.errors import VaultSealed
from claude_wrapper.vault.envelope import OVERHEAD, DataKeys, UnknownKeyVersion, Unreadable, key_version_of

KEYS = DataKeys("org_1", {1: b"a" * 32})
PLACE = st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))


@given(st.binary(max_size=2000), PLACE)
def test_what_is_sealed_opens_at_its_place(plain: bytes, place: tuple[str, str, str]) -> None:
    table, record, field = place
    sealed = KEYS.seal(plain, table=table, record=record, field=field)
    assert len(sealed) == len(plain) + OVERHEAD
    assert KEYS.open(sealed, table=table, record=record, field=field) == plain


@given(PLACE, PLACE)
def test_what_is_sealed_opens_nowhere_else(place: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    sealed = KEYS.seal(b"secret", table=place[0], record=place[1], field=place[2])
    if other != place:
        with pytest.raises(Unreadable):
            KEYS.open(sealed, table=other[0], record=other[1], field=other[2])


def test_places_that_only_join_to_the_same_text_are_different_places() -> None:
    sealed = KEYS.seal(b"secret", table="ab", record="c")
    with pytest.raises(Unreadable):
        KEYS.open(sealed, table="a", record="bc")


@given(st.binary(max_size=100), st.data())
@settings(max_examples=300)
def test_a_changed_byte_anywhere_is_noticed(plain: bytes, data: st.DataObject) -> None:
    sealed = bytearray(KEYS.seal(plain, table="t", record="r"))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VaultSealed):
        KEYS.open(bytes(sealed), table="t", record="r")


@given(st.binary(max_size=200))
def test_no_bytes_make_opening_fail_otherwise(garbage: bytes) -> None:
    with pytest.raises(VaultSealed):
        KEYS.open(garbage, table="t", record="r")


@given(st.integers(0, OVERHEAD + 9))
def test_a_cut_record_is_noticed(length: int) -> None:
    sealed = KEYS.seal(b"0123456789", table="t", record="r")
    with pytest.raises(VaultSealed):
        KEYS.open(sealed[:length], table="t", record="r")


def test_another_organisation_cannot_open_even_with_the_same_key() -> None:
    sealed = KEYS.seal(b"secret", table="t", record="r")
    with pytest.raises(Unreadable):
        DataKeys("org_2", {1: b"a" * 32}).open(sealed, table="t", record="r")


def test_sealing_twice_gives_different_bytes() -> None:
    assert KEYS.seal(b"x", table="t", record="r") != KEYS.seal(b"x", table="t", record="r")


def test_a_newer_key_seals_and_older_ones_still_open() -> None:
    both = DataKeys("org_1", {1: b"a" * 32, 2: b"b" * 32})
    old, new = KEYS.seal(b"x", table="t", record="r"), both.seal(b"y", table="t", record="r")
    assert (key_version_of(old), key_version_of(new)) == (1, 2)
    assert both.open(old, table="t", record="r") == b"x"
    with pytest.raises(UnknownKeyVersion):
        KEYS.open(new, table="t", record="r")


def test_fingerprints_tell_equality_within_one_organisation_and_survive_a_new_key() -> None:
    both = DataKeys("org_1", {1: b"a" * 32, 2: b"b" * 32})
    other = DataKeys("org_2", {1: b"c" * 32})
    assert KEYS.fingerprint("s") == both.fingerprint("s") != KEYS.fingerprint("t")
    assert KEYS.fingerprint("s") != other.fingerprint("s")


def test_keys_are_not_shown() -> None:
    assert repr(KEYS) == "DataKeys(org_1, versions [1])"
